"""The toy world in the formats of composed retrieval: CIRCO, CIRR, and ChatIR's dialogues over CIRCO's images.

The image of a query and what it asks for are scenes of the validation split. Beside them the gallery shows other changes of
the same image, of either split: neither the image alone nor the words alone tell them from what is meant.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fromage.toy.changes import Change, change
from fromage.toy.language import dialogue
from fromage.toy.scenes import Scene, sample_scene
from fromage.toy.writers import Paint, coco_header, coco_image, write_images, write_json

SETS = 128  # queries of CIRCO's and of CIRR's val at most, and dialogues of ChatIR
TESTS = 8  # val has as many times the queries of test
COPIES = 3  # images that are right for a query of CIRCO at most, one at least
OTHERS = 2  # other changes of a query's image in CIRCO's gallery
MEMBERS = 6  # images of a set of CIRR
ASPECTS = {"colour": "compare_change", "size": "compare_change", "place": "spatial_relations_background",
           "ground": "spatial_relations_background", "time": "spatial_relations_background",
           "add": "addition"}  # fmt: skip


class Changed(NamedTuple):
    """A scene, the change that is asked for, and other changes of it, all to different scenes."""

    scene: Scene
    asked: Change
    others: list[Scene]


def sample_changed(rng: random.Random, count: int, others: int) -> list[Changed]:
    """Draw scenes of the validation split, each with a change within it and others; none is shown by two of them."""
    found: list[Changed] = []
    seen: set[str] = set()
    while len(found) < count:
        scene = sample_scene(rng, "val")
        asked = change(scene, rng)
        if asked.scene.split != "val":
            continue
        some = {scene.key: scene, asked.scene.key: asked.scene}
        while len(some) < 2 + others:  # there are 28 changes at least
            other = change(scene, rng).scene
            some.setdefault(other.key, other)
        if not seen & some.keys():
            seen |= some.keys()
            found.append(Changed(scene, asked, list(some.values())[2:]))
    return found


def write(out: Path, count: int, rng: random.Random, paint: Paint) -> None:
    """Write circo, cirr and chatir for at most `count` queries of each."""
    count = min(count, SETS)
    tests = max(1, count // TESTS)
    shown = write_circo(out, sample_changed(rng, count + tests, OTHERS), tests, rng, paint)
    write_cirr(out, sample_changed(rng, count + tests, MEMBERS - 2), tests, rng, paint)
    write_chatir(out, shown, count, rng)


def size(count: int) -> int:
    """The images of write, about."""
    count = min(count, SETS)
    return (count + max(1, count // TESTS)) * (1 + (1 + COPIES) // 2 + OTHERS + MEMBERS)


def write_circo(out: Path, sets: Sequence[Changed], tests: int, rng: random.Random, paint: Paint) -> list[tuple[str, Scene]]:
    """CIRCO: val.json, test.json of the last `tests` sets, and COCO's list of the gallery.

    Each query has one to three right images, which show the same scene drawn again. Returns the images and what they show.
    """
    scenes: list[Scene] = []
    placed: list[tuple[int, list[int]]] = []  # ids of a query's image, and of its right ones
    for number, some in enumerate(sets):
        copies = [some.asked.scene] * (1 + number % COPIES)
        first = len(scenes) + 1
        placed.append((first, list(range(first + 1, first + 1 + len(copies)))))
        scenes += [some.scene, *copies, *some.others]
    order = rng.sample(range(1, len(scenes) + 1), len(scenes))  # so that ids tell nothing
    ids = dict(zip(range(1, len(scenes) + 1), order, strict=True))
    names = [f"{ids[number]:012d}.jpg" for number in range(1, len(scenes) + 1)]
    write_images(out / "circo" / "unlabeled2017", names, [(scene, ids[n]) for n, scene in enumerate(scenes, 1)], paint)
    listed = sorted(
        (coco_image(ids[n], name, scene) for n, (name, scene) in enumerate(zip(names, scenes, strict=True), 1)),
        key=lambda image: image["id"],
    )
    folder = out / "circo" / "annotations"
    write_json(folder / "image_info_unlabeled2017.json", coco_header("toy world, unlabeled") | {"images": listed})
    queries: list[dict[str, Any]] = []
    for (reference, right), some in zip(placed, sets, strict=True):
        query = {"reference_img_id": ids[reference], "relative_caption": some.asked.words}
        truths = [ids[number] for number in right]
        answers = {"target_img_id": truths[0], "gt_img_ids": truths, "semantic_aspects": [ASPECTS[some.asked.kind]]}
        shape = some.scene.things[0].shape
        queries.append(query | {"shared_concept": f"{'an' if shape == 'arrow' else 'a'} {shape}"} | answers)
    val, test = queries[: len(queries) - tests], queries[len(queries) - tests :]
    write_json(folder / "val.json", [query | {"id": number} for number, query in enumerate(val)])
    hidden = [{key: query[key] for key in ("reference_img_id", "relative_caption", "shared_concept")} for query in test]
    write_json(folder / "test.json", [query | {"id": number} for number, query in enumerate(hidden)])
    return [(f"unlabeled2017/{name}", scene) for name, scene in zip(names, scenes, strict=True)]


def write_cirr(out: Path, sets: Sequence[Changed], tests: int, rng: random.Random, paint: Paint) -> None:
    """CIRR: sets of six like images, val in dev and the last `tests` sets in test1, with both files of each split."""
    for split, folder, some in (("val", "dev", sets[: len(sets) - tests]), ("test1", "test1", sets[len(sets) - tests :])):
        pairs: list[dict[str, Any]] = []
        places: dict[str, str] = {}
        jobs: list[tuple[Scene, int]] = []
        for number, each in enumerate(some):
            scenes = [each.scene, each.asked.scene, *each.others]
            names = [f"{folder}-{number}-{n // 2}-img{n % 2}" for n in rng.sample(range(len(scenes)), len(scenes))]
            places |= {name: f"./{folder}/{name}.jpg" for name in names}
            jobs += [(scene, 10_000 + MEMBERS * number + n) for n, scene in enumerate(scenes)]
            members = rng.sample(names, len(names))
            ranks = {"reference_rank": members.index(names[0])}
            pair: dict[str, Any] = {"pairid": number, "reference": names[0], "caption": each.asked.words}
            if split == "val":
                ranks["target_rank"] = members.index(names[1])
                pair |= {"target_hard": names[1], "target_soft": {names[1]: 1.0}}
            pairs.append(pair | {"img_set": {"id": number, "members": members, **ranks}})
        write_images(out / "cirr" / folder, [Path(place).name for place in places.values()], jobs, paint)
        write_json(out / "cirr" / "captions" / f"cap.rc2.{split}.json", pairs)
        write_json(out / "cirr" / "image_splits" / f"split.rc2.{split}.json", places)


def write_chatir(out: Path, shown: Sequence[tuple[str, Scene]], count: int, rng: random.Random) -> None:
    """ChatIR: dialogues about some of CIRCO's images, of different scenes, over all of them."""
    first = {scene.key: (name, scene) for name, scene in reversed(shown)}
    talks = []
    for name, scene in rng.sample(list(first.values()), min(count, len(first))):
        short, rounds = dialogue(scene, rng)
        talks.append({"img": name, "dialog": [short.rstrip("."), *(f"{r.question} {r.answer}" for r in rounds)]})
    write_json(out / "chatir" / "VisDial_v1.0_queries_val.json", talks)
    write_json(out / "chatir" / "Search_Space_val_50k.json", rng.sample([name for name, _ in shown], len(shown)))
