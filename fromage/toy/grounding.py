"""The toy world's images of several objects in published formats: RefCOCO, Flickr30k Entities, LLaVA's JSON.

Images, scenes and boxes are the same in all of them, and fromage.toy.yes_no asks about them too; see fromage.toy.writers for
what writers have in common.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from fromage.octopus.boxes import relative, spelled
from fromage.toy.expressions import Meaning, at_length, by_looks, expression, meaning_of, words
from fromage.toy.language import WHEN, caption
from fromage.toy.masks import categories, category, instance
from fromage.toy.questions import COUNTS, Answer, turns
from fromage.toy.scenes import PIXELS, Mark, Scene
from fromage.toy.writers import CAPTIONS, Paint, coco_header, coco_image, write_images, write_json

IMAGES = Path("refcoco", "images")
ASKED = "what is in the picture?"


@dataclass(frozen=True)
class Shown:
    """An image of the referring scenes; marks: where its objects are."""

    number: int
    split: str
    scene: Scene
    marks: list[Mark]

    @property
    def boxes(self) -> list[list[float]]:
        """(x, y, width, height) in pixels, one per object."""
        return [mark.box for mark in self.marks]

    @property
    def stem(self) -> str:
        """The name of its file, without suffix."""
        return f"COCO_train2014_{self.number:012d}"


def write_refcoco(out: Path, scenes: dict[str, list[Scene]], rng: random.Random, paint: Paint) -> list[Shown]:
    """RefCOCO: COCO instances (shapes are the categories), and refs(unc).p, with one to three expressions per object.

    Instances have masks. As published, file_name in the pickle ends in the number of the annotation; the file is the one
    instances.json names. Returns the images, which the other writers describe too.
    """
    drafts = [Shown(i, *pair, []) for i, pair in enumerate(((split, s) for split in scenes for s in scenes[split]), 1)]
    jobs = [(draft.scene, draft.number) for draft in drafts]
    marks = write_images(out / IMAGES, [f"{draft.stem}.jpg" for draft in drafts], jobs, paint)
    shown = [Shown(draft.number, draft.split, draft.scene, found) for draft, found in zip(drafts, marks, strict=True)]
    pairs = [(one.number, *pair) for one in shown for pair in zip(one.scene.things, one.marks, strict=True)]
    annotations = [instance(ann, *pair) for ann, pair in enumerate(pairs, 1)]
    images = [coco_image(one.number, f"{one.stem}.jpg", one.scene) for one in shown]
    content = {"images": images, "annotations": annotations, "categories": categories()}
    write_json(out / "refcoco" / "instances.json", coco_header("toy world, referring expressions") | content)
    write_refs(out / "refcoco" / "refs(unc).p", shown, lambda scene, index: expression(scene, index, rng))
    return shown


def write_refcoco_plus_and_g(out: Path, shown: Sequence[Shown], rng: random.Random) -> None:
    """RefCOCO+, which tells objects apart by their looks alone, and RefCOCOg, which describes them at length.

    Both are about the images and instances of RefCOCO. Objects that looks do not tell apart are not in RefCOCO+.
    """
    write_refs(out / "refcoco+" / "refs(unc).p", shown, lambda scene, index: by_looks(scene, index, rng))
    write_refs(out / "refcocog" / "refs(umd).p", shown, lambda scene, index: at_length(scene, index, rng), tries=1)


def write_refs(path: Path, shown: Sequence[Shown], say: Callable[[Scene, int], str | None], tries: int = 3) -> None:
    """A file of references: for each object up to so many different expressions, where it can be said at all."""
    refs: list[dict[str, Any]] = []
    first = ann = 0  # the next sentence's number, and the last annotation's
    for one in shown:
        for index, thing in enumerate(one.scene.things):
            ann += 1
            texts = dict.fromkeys(text for text in (say(one.scene, index) for _ in range(tries)) if text)
            said = [{"raw": t, "sent": t, "tokens": t.split(), "sent_id": n} for n, t in enumerate(texts, first)]
            first += len(said)
            ref: dict[str, Any] = {
                "ref_id": len(refs),
                "ann_id": ann,
                "image_id": one.number,
                "category_id": category(thing),
            }
            ref |= {"split": one.split, "file_name": f"{one.stem}_{ann}.jpg"}
            if said:
                refs.append(ref | {"sentences": said, "sent_ids": [s["sent_id"] for s in said]})
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(refs, protocol=2))


def write_entities(out: Path, shown: Sequence[Shown], rng: random.Random) -> None:
    """Flickr30k Entities: five sentences per image with marked entities, their boxes in XML, and a list of ids per split.

    Pixels are counted from 1, and xmax and ymax are those of the last pixel, as published. Objects of one shape are together
    an entity too, of several boxes; the ground is a scene without a box, the time an entity without one. Every sentence
    names every object, by one to four phrases with boxes.
    """
    folder = out / "flickr30k_entities"
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for one in shown:
        ids = _entities(one)
        lines = [_marked(one.scene, ids, rng) for _ in range(CAPTIONS)]
        (folder / "Sentences" / f"{one.stem}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        tree = _annotation(one, ids)
        (folder / "Annotations" / f"{one.stem}.xml").write_text(ET.tostring(tree, encoding="unicode"), encoding="utf-8")
    for split in dict.fromkeys(one.split for one in shown):
        listed = "".join(f"{one.stem}\n" for one in shown if one.split == split)
        (folder / f"{split}.txt").write_text(listed, encoding="utf-8")


Entity = tuple[int, ...] | str  # objects, or "ground" or "time"


def _entities(one: Shown) -> dict[Entity, int]:
    """The ids of an image's entities: each object, those of one shape together, ground, time."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, thing in enumerate(one.scene.things):
        shapes[thing.shape] = (*shapes.get(thing.shape, ()), index)
    singles = [(index,) for index in range(len(one.scene.things))]
    listed: list[Entity] = [*singles, *(group for group in shapes.values() if len(group) > 1), "ground", "time"]
    return {entity: 16 * one.number + n for n, entity in enumerate(listed)}


def _marked(scene: Scene, ids: dict[Entity, int], rng: random.Random) -> str:
    """One sentence; half of the sentences about several objects of one shape name these together."""
    groups = [entity for entity in ids if isinstance(entity, tuple) and len(entity) > 1]
    together = [group for group in groups if rng.random() < 0.5]
    named: list[Entity] = [(i,) for i in range(len(scene.things)) if not any(i in group for group in together)]
    rng.shuffle(named)
    phrases = [f"[/EN#{ids[entity]}/other {_named(scene, entity, rng)}]" for entity in (*together, *named)]
    when, time = WHEN[scene.time].split()
    setting = f"on [/EN#{ids['ground']}/scene the {scene.ground}] {when} [/EN#{ids['time']}/other {time}]"
    return f"{' and '.join(phrases)} , {setting} ."


def _named(scene: Scene, entity: Entity, rng: random.Random) -> str:
    """A noun phrase that fits one object only, or one for all objects of a shape: 'two stars'."""
    things = [scene.things[int(index)] for index in entity]
    if len(things) > 1:
        return f"{COUNTS[len(things)]} {words(Meaning(things[0].shape), '', plural=True)}"
    said = meaning_of(scene, int(entity[0]), rng, {"plain": 1, "two": 1})
    return words(Meaning(things[0].shape, said.colour, said.size, said.place), "a")


def _annotation(one: Shown, ids: dict[Entity, int]) -> ET.Element:
    root = ET.Element("annotation")
    ET.SubElement(root, "filename").text = f"{one.stem}.jpg"
    size = ET.SubElement(root, "size")
    for name, value in (("width", PIXELS), ("height", PIXELS), ("depth", 3)):
        ET.SubElement(size, name).text = str(value)
    for index, (x, y, w, h) in enumerate(one.boxes):
        item = ET.SubElement(root, "object")
        for entity, number in ids.items():
            if isinstance(entity, tuple) and index in entity:
                ET.SubElement(item, "name").text = str(number)
        box = ET.SubElement(item, "bndbox")
        for name, edge in (("xmin", x + 1), ("ymin", y + 1), ("xmax", x + w), ("ymax", y + h)):
            ET.SubElement(box, name).text = str(round(edge))
    for entity, is_scene in (("ground", True), ("time", False)):
        item = ET.SubElement(root, "object")
        for name, value in (("name", ids[entity]), ("scene", int(is_scene)), ("nobndbox", int(not is_scene))):
            ET.SubElement(item, name).text = str(value)
    return root


def write_llava(out: Path, shown: Sequence[Shown], more: dict[str, list[tuple[str, Scene]]], rng: random.Random) -> None:
    """LLaVA's JSON: pretrain_{split}, one caption per image, and instruct_{split}, several questions per image.

    Images are named from the world's folder. more: further images for pretrain, by split, with their scenes.
    """
    for split in dict.fromkeys(one.split for one in shown):
        mine = [one for one in shown if one.split == split]
        images = [(_image(one), one.scene) for one in mine] + more[split]
        briefs = [_talk(name, [(ASKED, caption(scene, rng))], rng.random() < 0.5) for name, scene in images]
        write_json(out / "llava" / f"pretrain_{split}.json", briefs)
        asked = [(one, turns(one.scene, rng)) for one in mine]
        talks = [_talk(_image(one), [(q, _told(a, one.boxes)) for q, a in said], True) for one, said in asked]
        write_json(out / "llava" / f"instruct_{split}.json", talks)


def _image(one: Shown) -> str:
    return (IMAGES / f"{one.stem}.jpg").as_posix()


def _talk(image: str, said: Sequence[tuple[str, str]], image_first: bool) -> dict[str, Any]:
    """An entry of LLaVA's JSON; the image is before or after the first question, as published."""
    lines = [{"from": who, "value": text} for turn in said for who, text in zip(("human", "gpt"), turn, strict=True)]
    first = lines[0]["value"]
    lines[0]["value"] = f"<image>\n{first}" if image_first else f"{first}\n<image>"
    return {"id": Path(image).stem, "image": image, "conversations": lines}


def _told(answer: Answer, boxes: list[list[float]]) -> str:
    """An answer as text, with boxes for the objects it points at, without spaces between consecutive boxes."""
    texts = [piece if isinstance(piece, str) else _box(boxes[piece]) for piece in answer]
    return " ".join(texts).replace("] [", "][")


def _box(box: list[float]) -> str:
    x, y, w, h = box
    shares = relative(x, y, x + w, y + h, PIXELS, PIXELS)
    assert shares  # drawn in the image
    return spelled(shares)
