"""The toy world on disk: the same bytes every time, no scene in both splits, every format as published."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fromage.errors import UserError
from fromage.toy.language import ToyStory
from fromage.toy.scenes import COLOURS, PIXELS, PLACES, SHAPES, SIZES, Scene, Thing
from fromage.toy.world import make_world
from fromage.toy.writers import sample_stories

COUNTS = {"train": 40, "val": 30, "stories": 12, "dialogues": 14, "refs": 15}
SPLITS = ("train", "val")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "world"
    result = make_world(out, seed=3, **COUNTS, progress=False)
    assert result == {"version": 4, "seed": 3, "counts": COUNTS, "made": True}
    return out


def load(path: Path):
    return json.loads(path.read_text())


def scene_of(key: str) -> Scene:
    things, setting = key.split("@")
    words = [t.split("-") for t in things.split("+")]
    ground, time = setting.split("-")
    return Scene(tuple(Thing(shape, colour, size, place) for size, colour, shape, place in words), ground, time)


def samples(folder: Path) -> list[dict[str, bytes]]:
    """Every sample of the shards of a folder, by file ending."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, ending = member.name.split(".", 1)
                found.setdefault(key, {})[ending] = tar.extractfile(member).read()
    return list(found.values())


def image(file: Path | bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        assert image.format == "JPEG" and image.size == (PIXELS, PIXELS) and image.mode == "RGB"
        return np.asarray(image).astype(int)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_arguments_same_bytes_whatever_the_hash_seed(world, tmp_path):
    out = tmp_path / "again"
    one_process = "import os; os.cpu_count = lambda: 1; from fromage.toy.world import make_world"
    code = f"{one_process}; make_world({str(out)!r}, seed=3, **{COUNTS}, progress=False)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "77"}, timeout=60)
    assert digests(out) == digests(world)


def test_another_seed_is_another_world(world, tmp_path):
    make_world(tmp_path / "other", seed=4, **COUNTS, progress=False)
    mine, other = digests(world), digests(tmp_path / "other")
    assert set(mine) == set(other)
    content = {name for name in mine if name.endswith((".json", ".tar", ".p")) and not name.endswith("sizes.json")}
    assert not {name for name in content if mine[name] == other[name]}


def test_a_world_that_is_there_is_kept(world):
    before = {p: p.stat().st_mtime_ns for p in world.rglob("*")}
    assert make_world(world, seed=3, **COUNTS, progress=False)["made"] is False
    assert before == {p: p.stat().st_mtime_ns for p in world.rglob("*")}


@pytest.mark.parametrize("change", [{"seed": 9}, {"val": 31}])
def test_a_world_of_other_arguments_is_refused(world, change):
    with pytest.raises(UserError, match="other arguments"):
        make_world(world, **({"seed": 3, **COUNTS} | change), progress=False)


def test_a_folder_of_other_things_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("chapter one")
    with pytest.raises(UserError, match="something else than a toy world"):
        make_world(tmp_path, **COUNTS, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("bad", [{"val": 0}, {"train": -1}, {"stories": 100_000}])
def test_impossible_counts_are_refused_at_once(tmp_path, bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        make_world(tmp_path / "world", **(COUNTS | bad), progress=False)
    assert not list(tmp_path.iterdir())


def test_a_failed_run_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("fromage.toy.writers.write_vist", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(UserError, match="no space left"):
        make_world(tmp_path / "world", **COUNTS, progress=False)
    assert not list(tmp_path.iterdir())


def test_validation_scenes_never_occur_in_train(world):
    shown = {split: {json.loads(s["json"])["scene"] for s in samples(world / "cc3m" / split)} for split in SPLITS}
    refs = pickle.loads((world / "refcoco/refs(unc).p").read_bytes())
    keys = {image["id"]: image["scene"] for image in load(world / "refcoco/instances.json")["images"]}
    for split in SPLITS:
        shown[split] |= {i["scene"] for i in load(world / f"coco/annotations/captions_{split}2017.json")["images"]}
        shown[split] |= {d["scene"] for d in load(world / f"visdial/visdial_1.0_{split}.json")["data"]["dialogs"]}
        shown[split] |= {keys[ref["image_id"]] for ref in refs if ref["split"] == split}
        photos = [i["scene"] for i in load(world / f"vist/sis/{split}.story-in-sequence.json")["images"]]
        shown[split] |= set(photos[4::5])
        shown["train"] |= {key for n, key in enumerate(photos) if n % 5 < 4}  # the first four are training scenes
    assert not shown["train"] & shown["val"]
    assert {scene_of(key).split for key in shown["train"]} == {"train"}
    assert {scene_of(key).split for key in shown["val"]} == {"val"}


@pytest.mark.parametrize("split", SPLITS)
def test_cc3m(world, split):
    found = samples(world / "cc3m" / split)
    assert len(found) == COUNTS[split]
    metas = [json.loads(s["json"]) for s in found]
    assert len({m["scene"] for m in metas}) == len({m["key"] for m in metas}) == COUNTS[split]
    for sample, meta in zip(found, metas, strict=True):
        assert set(sample) == {"jpg", "txt", "json"}
        assert sample["txt"].decode() == meta["caption"] and (split == "train" or meta["caption"].endswith("."))
        assert hashlib.sha256(sample["jpg"]).hexdigest() == meta["sha256"]
        image(sample["jpg"])


@pytest.mark.parametrize("split", SPLITS)
def test_coco_captions(world, split):
    content = load(world / f"coco/annotations/captions_{split}2017.json")
    assert set(content) == {"info", "licenses", "images", "annotations"}
    pairs = [json.loads(s["json"])["scene"] for s in samples(world / "cc3m" / split)]
    assert [i["scene"] for i in content["images"]] == pairs
    assert len({a["id"] for a in content["annotations"]}) == 5 * len(content["images"])
    said: dict[int, set[str]] = {}
    for a in content["annotations"]:
        assert set(a) == {"image_id", "id", "caption"}
        said.setdefault(a["image_id"], set()).add(a["caption"])
    for entry in content["images"]:
        assert (entry["height"], entry["width"]) == (PIXELS, PIXELS)
        assert entry["file_name"] == f"{entry['id']:012d}.jpg"
        assert len(said[entry["id"]]) == 5
        image(world / f"coco/{split}2017" / entry["file_name"])
    assert len(list((world / f"coco/{split}2017").iterdir())) == len(content["images"])


@pytest.mark.parametrize("split", SPLITS)
def test_vist(world, split):
    content = load(world / f"vist/sis/{split}.story-in-sequence.json")
    assert len(content["images"]) == len(content["annotations"]) == 5 * COUNTS["stories"]
    photos = {i["id"]: i for i in content["images"]}
    stories: dict[str, list[dict]] = {}
    for entry in content["annotations"]:
        (told,) = entry
        assert told["tier"] == "story-in-sequence" and told["original_text"] and told["text"]
        assert photos[told["photo_flickr_id"]]["album_id"] == told["album_id"]
        stories.setdefault(told["story_id"], []).append(told)
        image(world / f"vist/images/{split}" / f"{told['photo_flickr_id']}.jpg")
    assert {a["id"] for a in content["albums"]} == {told[0]["album_id"] for told in stories.values()}
    assert len({told["storylet_id"] for story in stories.values() for told in story}) == len(photos)
    assert len(stories) == COUNTS["stories"]
    assert all([told["worker_arranged_photo_order"] for told in story] == [0, 1, 2, 3, 4] for story in stories.values())
    last = [photos[story[-1]["photo_flickr_id"]]["scene"] for story in stories.values()]
    assert len(set(last)) == len(last)
    assert sum(i["scene"] in last for i in content["images"]) == len(last) or split == "train"


def said_attributes(text: str, scene: Scene) -> set[str]:
    thing = scene.things[0]
    words = {"shape": thing.shape, "colour": thing.colour, "size": thing.size, "place": thing.place}
    words |= {"ground": scene.ground, "time": scene.time}
    return {what for what, word in words.items() if re.search(rf"\b{word}\b", text)}


def test_last_sentence_of_a_story_is_not_enough():
    stories: list[ToyStory] = sample_stories(random.Random(0), "val", 60)
    for tale in stories:
        last = tale.scenes[-1]
        alone, together = said_attributes(tale.sentences[-1], last), said_attributes(" ".join(tale.sentences), last)
        assert len(alone) <= 3 and len(together) >= 5 and alone < together
        assert len({scene.key for scene in tale.scenes}) == 5


@pytest.mark.parametrize("split", SPLITS)
def test_visdial(world, split):
    content = load(world / f"visdial/visdial_1.0_{split}.json")
    assert (content["version"], content["split"]) == ("1.0", split)
    data = content["data"]
    assert len(set(data["questions"])) == len(data["questions"]) and len(set(data["answers"])) == len(data["answers"])
    assert not any("?" in q for q in data["questions"])
    assert len({d["scene"] for d in data["dialogs"]}) == len({d["image_id"] for d in data["dialogs"]}) == COUNTS["dialogues"]
    positions = []
    for dialog in data["dialogs"]:
        assert len(dialog["dialog"]) == 10 and dialog["caption"]
        for r in dialog["dialog"]:
            assert data["questions"][r["question"]] and data["answers"][r["answer"]]
            if split == "val":
                options = [data["answers"][i] for i in r["answer_options"]]
                assert len(set(options)) == 100 and options[r["gt_index"]] == data["answers"][r["answer"]]
                positions.append(r["gt_index"])
        name = f"visdial/images/val/VisualDialog_val2018_{dialog['image_id']:012d}.jpg"
        image(world / (name if split == "val" else f"coco/train2017/{dialog['image_id']:012d}.jpg"))
    assert split == "train" or len(set(positions)) > 50


def test_visdial_train_dialogues_are_about_their_coco_images(world):
    scenes = {i["id"]: i["scene"] for i in load(world / "coco/annotations/captions_train2017.json")["images"]}
    for dialog in load(world / "visdial/visdial_1.0_train.json")["data"]["dialogs"]:
        assert scenes[dialog["image_id"]] == dialog["scene"]


def test_visdial_dense_annotations(world):
    data = load(world / "visdial/visdial_1.0_val.json")["data"]
    dense = load(world / "visdial/visdial_1.0_val_dense_annotations.json")
    assert [d["image_id"] for d in dense] == [d["image_id"] for d in data["dialogs"]]
    for rated, dialog in zip(dense, data["dialogs"], strict=True):
        said = dialog["dialog"][rated["round_id"] - 1]
        relevance = rated["gt_relevance"]
        assert len(relevance) == 100 and relevance[said["gt_index"]] == 1.0
        assert all(r == 0 or 0.5 <= r <= 1 for r in relevance) and 2 <= sum(r > 0 for r in relevance) <= 3


def test_refcoco(world):
    content = load(world / "refcoco/instances.json")
    refs = pickle.loads((world / "refcoco/refs(unc).p").read_bytes())
    assert [c["name"] for c in content["categories"]] == list(SHAPES)
    assert len(content["images"]) == 2 * COUNTS["refs"]
    images, annotations = {i["id"]: i for i in content["images"]}, {a["id"]: a for a in content["annotations"]}
    assert len(refs) == len(annotations) == len({r["ref_id"] for r in refs}) == len({r["ann_id"] for r in refs})
    assert {r["split"] for r in refs} == set(SPLITS)
    sent_ids = [i for r in refs for i in r["sent_ids"]]
    assert len(set(sent_ids)) == len(sent_ids)
    for ref in refs:
        ann, image = annotations[ref["ann_id"]], images[ref["image_id"]]
        assert ann["image_id"] == ref["image_id"] and ann["category_id"] == ref["category_id"]
        assert ref["file_name"] == image["file_name"].replace(".jpg", f"_{ann['id']}.jpg")
        scene = scene_of(image["scene"])
        shape = SHAPES[ref["category_id"] - 1]
        assert ref["sentences"] and ref["sent_ids"] == [s["sent_id"] for s in ref["sentences"]]
        for said in ref["sentences"]:
            assert said["tokens"] == said["sent"].split() and said["raw"]
        (place,) = {t.place for t in scene.things if lies_at(ann["bbox"], t.place)}
        assert [t.shape for t in scene.things if t.place == place] == [shape]
        assert not any(word in SHAPES and word != shape for said in ref["sentences"] for word in [said["tokens"][1]])


def lies_at(box: list[float], place: str) -> bool:
    """Whether a box's centre is in the named third of the image."""
    x, y = (box[0] + box[2] / 2) / PIXELS, (box[1] + box[3] / 2) / PIXELS
    spots = {"left": x < 0.35, "right": x > 0.65, "top": y < 0.35, "bottom": y > 0.65}
    return spots.get(place, 0.35 < x < 0.65 and 0.35 < y < 0.65)


def test_refcoco_boxes_lie_in_the_image_around_something(world):
    content = load(world / "refcoco/instances.json")
    names = {i["id"]: i["file_name"] for i in content["images"]}
    same = [[a["category_id"] for a in content["annotations"] if a["image_id"] == i] for i in names]
    assert sum(len(set(shapes)) < len(shapes) for shapes in same) > len(same) / 2
    for ann in content["annotations"]:
        x, y, w, h = ann["bbox"]
        assert x >= 0 and y >= 0 and w > 8 and h > 8 and x + w <= PIXELS and y + h <= PIXELS
        pixels = image(world / "refcoco/images" / names[ann["image_id"]])
        ground = np.median(pixels.reshape(-1, 3), axis=0)
        inside = pixels[round(y) : round(y + h), round(x) : round(x + w)]
        assert (np.abs(inside - ground).max(-1) > 30).mean() > 0.1


def boxes_of(world: Path) -> dict[str, list[list[float]]]:
    """Left, top, right, bottom in pixels of each referring image's objects, by the image's file name."""
    content = load(world / "refcoco/instances.json")
    found: dict[str, list[list[float]]] = {image["file_name"]: [] for image in content["images"]}
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for ann in content["annotations"]:
        x, y, w, h = ann["bbox"]
        found[names[ann["image_id"]]].append([x, y, x + w, y + h])
    return found


def test_flickr30k_entities(world):
    boxes, folder = boxes_of(world), world / "flickr30k_entities"
    train, val = ((folder / f"{split}.txt").read_text().split() for split in SPLITS)
    assert len(train) == len(val) == COUNTS["refs"] and {f"{i}.jpg" for i in train + val} == set(boxes)
    together = 0
    for name, mine in boxes.items():
        root = ElementTree.parse(folder / "Annotations" / f"{Path(name).stem}.xml").getroot()
        assert root.find("filename").text == name
        assert [root.find(f"size/{side}").text for side in ("width", "height", "depth")] == [str(PIXELS)] * 2 + ["3"]
        named: dict[str, list[list[int]]] = {}
        for item in root.findall("object"):
            sides = [int(side.text) for side in item.iterfind("bndbox/*")]  # xmin, ymin, xmax, ymax
            assert bool(sides) != (item.find("nobndbox") is not None and item.find("scene") is not None)
            for number in item.findall("name"):
                named.setdefault(number.text, []).append(sides)
        lines = (folder / "Sentences" / f"{Path(name).stem}.txt").read_text().splitlines()
        assert len(lines) == 5
        for number, kind, phrase in re.findall(r"\[/EN#(\d+)/(\w+) ([^\]]+)\]", "".join(lines)):
            first = phrase.split()[0]
            wanted = COUNT_WORDS.get(first, 1 if first in ("a", "an") else 0)
            assert len([sides for sides in named[number] if sides]) == wanted, (kind, phrase)
            together += wanted > 1
            for left, top, right, bottom in filter(None, named[number]):  # counted from 1, the last pixel included
                assert any(np.allclose((left - 1, top - 1, right, bottom), box, atol=0.51) for box in mine)
    assert together


COUNT_WORDS = {"two": 2, "three": 3, "four": 4}


@pytest.mark.parametrize("split", SPLITS)
def test_llava(world, split):
    boxes = {f"refcoco/images/{name}": found for name, found in boxes_of(world).items()}
    briefs, talks = load(world / f"llava/pretrain_{split}.json"), load(world / f"llava/instruct_{split}.json")
    assert len(talks) == COUNTS["refs"] and len(briefs) == COUNTS["refs"] + COUNTS[split]
    assert {talk["image"] for talk in talks} == {brief["image"] for brief in briefs} & set(boxes)
    for entry in briefs + talks:
        assert set(entry) == {"id", "image", "conversations"} and (world / entry["image"]).is_file()
        lines = entry["conversations"]
        assert [line["from"] for line in lines] == ["human", "gpt"] * (len(lines) // 2)
        assert ["<image>" in line["value"] for line in lines] == [True] + [False] * (len(lines) - 1)
    pointed = [(talk["image"], line["value"]) for talk in talks for line in talk["conversations"] if "[" in line["value"]]
    for image, text in pointed:
        for spelled in re.findall(r"\[(\d\.\d{3},\d\.\d{3},\d\.\d{3},\d\.\d{3})\]", text):
            sides = np.array(spelled.split(","), float) * PIXELS
            assert any(np.allclose(sides, box, atol=0.06) for box in boxes[image])
    assert any("][" in text for _, text in pointed)  # several boxes in an answer
    assert not any("[" in line["value"] for brief in briefs for line in brief["conversations"])


def scenes_of(world: Path) -> dict[str, Scene]:
    """The scenes of the referring images by file name."""
    return {image["file_name"]: scene_of(image["scene"]) for image in load(world / "refcoco/instances.json")["images"]}


def lines_of(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == list(range(1, len(rows) + 1))
    assert len({(row["image"], row["text"]) for row in rows}) == len(rows)
    assert [row["label"] for row in rows] == ["yes", "no"] * (len(rows) // 2)
    return rows


@pytest.mark.parametrize("split", SPLITS)
def test_attributes(world, split):
    rows, scenes = lines_of(world / f"attributes/{split}.json"), scenes_of(world)
    assert len(rows) == 4 * COUNTS["refs"]
    words = {"shape": set(SHAPES), "colour": set(COLOURS), "size": set(SIZES), "place": set(PLACES)}
    for row in rows:
        assert set(row) == {"question_id", "image", "text", "label", "category"}
        said = re.findall(r"\w+", row["text"])
        things = scenes[row["image"]].things
        assert {what for what in words if words[what] & set(said)} == {"shape", row["category"]}
        asked = [{getattr(thing, what) for what in words} for thing in things]
        named = {word for word in said if any(word in some for some in words.values())}
        assert any(named <= looks for looks in asked) == (row["label"] == "yes")
    assert {row["category"] for row in rows} == set(words)


def test_pope(world):
    splits = {s: lines_of(world / f"pope/coco_pope_{s}.json") for s in ("random", "popular", "adversarial")}
    scenes = {name: {thing.shape for thing in scene.things} for name, scene in scenes_of(world).items()}
    val = {image: shapes for image, shapes in scenes.items() if int(image[-16:-4]) > COUNTS["refs"]}
    asked = {split: [(r["image"], r["text"].rstrip("?").split()[-1], r["label"]) for r in splits[split]] for split in splits}
    for rows in asked.values():
        assert {image for image, *_ in rows} == set(val)
        assert all((shape in val[image]) == (label == "yes") and shape in SHAPES for image, shape, label in rows)
        assert len(rows) == sum(2 * min(3, len(shapes)) for shapes in val.values())
    assert asked["random"][::2] == asked["popular"][::2] == asked["adversarial"][::2]  # what is there
    often = {shape: sum(shape in shapes for shapes in val.values()) for shape in SHAPES}
    for image, shapes in val.items():
        missing = [shape for where, shape, label in asked["popular"] if where == image and label == "no"]
        rest = [often[shape] for shape in SHAPES if shape not in shapes]
        assert [often[shape] for shape in missing] == sorted(rest, reverse=True)[: len(missing)]
        beside = {s: sum(len(shapes & some) for some in val.values() if s in some) for s in SHAPES if s not in shapes}
        missing = [shape for where, shape, label in asked["adversarial"] if where == image and label == "no"]
        assert [beside[shape] for shape in missing] == sorted(beside.values(), reverse=True)[: len(missing)]
    assert len({tuple(rows) for rows in asked.values()}) == 3


def masks_of(path: Path) -> dict[int, np.ndarray]:
    """The masks of an instances.json by annotation, as its publishers' own library reads them."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = pytest.importorskip("pycocotools.coco").COCO(str(path))
    return {number: coco.annToMask(note).astype(bool) for number, note in coco.anns.items()}


@pytest.mark.parametrize(
    ("file", "images"),
    [("refcoco/instances.json", "refcoco/images"), ("coco/annotations/instances_val2017.json", "coco/val2017")],
)
def test_masks_are_those_of_the_drawn_shapes(world, file, images):
    content, masks = load(world / file), masks_of(world / file)
    entries = {entry["id"]: entry for entry in content["images"]}
    holes = 0
    for note in content["annotations"]:
        entry, mask = entries[note["image_id"]], masks[note["id"]]
        pixels = image(world / images / entry["file_name"])
        thing = next(t for t in scene_of(entry["scene"]).things if lies_at(note["bbox"], t.place))
        assert thing.shape == content["categories"][note["category_id"] - 1]["name"]
        assert mask.sum() == pytest.approx(note["area"], rel=0.15) and note["iscrowd"] == 0
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        x, y, w, h = note["bbox"]
        assert np.allclose([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], (x, y, x + w, y + h), atol=2.6)
        near = np.abs(pixels - COLOURS[thing.colour]).max(-1) < 60
        assert near[mask].mean() > 0.5, thing  # the edge is of another colour
        if thing.shape == "ring":
            holes += 1
            assert set(note["segmentation"]) == {"size", "counts"} and not mask[round(y + h / 2), round(x + w / 2)]
        else:
            ((*corners,),) = note["segmentation"]
            assert len(corners) >= 6 and len(corners) % 2 == 0
    assert holes
    assert len({note["id"] for note in content["annotations"]}) == len(content["annotations"])


def test_coco_instances_are_of_the_captioned_images(world):
    for split in SPLITS:
        captions, instances = (load(world / f"coco/annotations/{w}_{split}2017.json") for w in ("captions", "instances"))
        assert captions["images"] == instances["images"]
        shown = [len(scene_of(entry["scene"]).things) for entry in instances["images"]]
        assert len(instances["annotations"]) == sum(shown)


def test_visual_genome(world):
    folder = world / "visual_genome"
    images, regions, objects = (load(folder / f"{name}.json") for name in ("image_data", "region_descriptions", "objects"))
    numbers = [entry["image_id"] for entry in images]
    assert numbers == [entry["id"] for entry in regions] == [entry["image_id"] for entry in objects]
    assert numbers == list(range(1, COUNTS["refs"] + 1))
    for entry, described, named in zip(images, regions, objects, strict=True):
        assert (entry["width"], entry["height"], entry["coco_id"]) == (PIXELS, PIXELS, None)
        place = "/".join(entry["url"].split("/")[-2:])
        assert re.fullmatch(rf"VG_100K(_2)?/{entry['image_id']}\.jpg", place)
        image(folder / place)
        scene = scene_of(entry["scene"])
        assert scene.split == "train"
        assert len(scene.things) == len(described["regions"])
        for region, one in zip(described["regions"], named["objects"], strict=True):
            assert region["image_id"] == entry["image_id"]
            sides = [region[side] for side in ("x", "y", "width", "height")]
            assert sides == [one[side] for side in ("x", "y", "w", "h")] and all(isinstance(side, int) for side in sides)
            (thing,) = (thing for thing in scene.things if lies_at(sides, thing.place))
            assert one["names"] == [thing.shape]
            assert thing.shape in region["phrase"] or " one" in region["phrase"]
    for what, entries, key in (("regions", regions, "region_id"), ("objects", objects, "object_id")):
        assert len({one[key] for entry in entries for one in entry[what]}) == sum(len(entry[what]) for entry in entries)
    assert {path.parent.name for path in folder.rglob("*.jpg")} == {"VG_100K", "VG_100K_2"}
    assert len(list(folder.rglob("*.jpg"))) == COUNTS["refs"]


def test_composed_queries_ask_for_a_change_of_their_image(world):
    folder = world / "composed" / "circo"
    listed = {entry["id"]: entry for entry in load(folder / "annotations/image_info_unlabeled2017.json")["images"]}
    val, test = (load(folder / f"annotations/{split}.json") for split in ("val", "test"))
    assert (len(val), len(test)) == (COUNTS["dialogues"], 1) and [query["id"] for query in val] == list(range(len(val)))
    assert {path.name for path in (folder / "unlabeled2017").iterdir()} == {entry["file_name"] for entry in listed.values()}
    assert test[0].keys() == {"reference_img_id", "relative_caption", "shared_concept", "id"}
    for query in val:
        shown, meant = (scene_of(listed[query[key]]["scene"]) for key in ("reference_img_id", "target_img_id"))
        assert shown.split == meant.split == "val" and query["target_img_id"] == query["gt_img_ids"][0]
        assert {*query["gt_img_ids"]} == {i for i, entry in listed.items() if scene_of(entry["scene"]) == meant}
        assert_changed(shown, meant, query["relative_caption"])
    aspects = {aspect for query in val for aspect in query["semantic_aspects"]}
    assert aspects <= {"compare_change", "spatial_relations_background", "addition"}


def assert_changed(shown: Scene, meant: Scene, words: str) -> None:
    """One thing differs, and the words name what is new."""
    new = {*meant.things} - {*shown.things}
    changes = len(new) + (shown.ground != meant.ground) + (shown.time != meant.time)
    assert changes == 1 and len(meant.things) - len(shown.things) in (0, 1)
    said = set(words.split())
    if shown.ground != meant.ground:
        assert meant.ground in said
    elif shown.time != meant.time:
        assert meant.time in said
    else:
        (thing,) = new
        (same,) = [old for old in shown.things if old.shape == thing.shape] or [Thing(thing.shape, "", "", "")]
        assert thing.shape in said
        assert {thing.colour, thing.size, thing.place} - {same.colour, same.size, same.place} <= said


def test_cirr_has_sets_of_six_and_hides_the_answers_of_its_test_split(world):
    folder = world / "composed" / "cirr"
    for split, count in (("val", COUNTS["dialogues"]), ("test1", 1)):
        pairs, places = (load(folder / f"{at}.rc2.{split}.json") for at in ("captions/cap", "image_splits/split"))
        assert len(pairs) == count and len(places) == 6 * count
        assert len({image(folder / place).tobytes() for place in places.values()}) == len(places)
        for pair in pairs:
            members = pair["img_set"]["members"]
            assert members[pair["img_set"]["reference_rank"]] == pair["reference"] and len({*members}) == 6
            assert ("target_hard" in pair) == (split == "val")
            if split == "val":
                assert members[pair["img_set"]["target_rank"]] == pair["target_hard"]


def test_chatir_tells_of_images_of_the_pool(world):
    folder = world / "composed" / "chatir"
    talks, pool = load(folder / "VisDial_v1.0_queries_val.json"), load(folder / "Search_Space_val_50k.json")
    assert all((world / "composed" / "circo" / name).is_file() for name in pool) and len({*pool}) == len(pool)
    assert len(talks) == COUNTS["dialogues"] and len({talk["img"] for talk in talks}) == len(talks)
    for talk in talks:
        assert talk["img"] in pool and len(talk["dialog"]) == 11 and all("? " in text for text in talk["dialog"][1:])


def test_a_world_of_before_gets_composed_queries_and_keeps_the_rest(world, tmp_path):
    old = tmp_path / "world"
    shutil.copytree(world, old)
    shutil.rmtree(old / "composed")
    before = {p: p.stat().st_mtime_ns for p in old.rglob("*") if p.is_file()}
    assert make_world(old, seed=3, **COUNTS, progress=False)["made"] is False
    assert before == {p: p.stat().st_mtime_ns for p in before} and digests(old) == digests(world)


FORMER = {  # digests of files as they were before there were masks, POPE's splits and Visual Genome
    "llava/instruct_val.json": "e0e895829aeb37b4aa9a16f213ceeeb2f9bfa2f507c616ef5420556980180355",
    "coco/annotations/captions_train2017.json": "2b52def184eb850538260c1baeb04a01ad95c5d1e8a463add0d949abc9f5d438",
    "visdial/visdial_1.0_val.json": "146682b8063e9903e92ee0eaf0210330a71386b30aa87af325585c4a24e4d373",
}


def test_new_data_sets_leave_the_former_as_they_were(world):
    here = digests(world)
    for name, digest in FORMER.items():
        assert here[name] == digest, name


@pytest.mark.parametrize(("name", "file"), [("refcoco+", "refs(unc).p"), ("refcocog", "refs(umd).p")])
def test_refcoco_plus_and_g_mean_one_object_by_looks_or_at_length(world, name, file):
    coco = world / "refcoco"
    notes = {note["id"]: note for note in json.loads((coco / "instances.json").read_text())["annotations"]}
    refs = pickle.loads((world / name / file).read_bytes())
    assert {ref["split"] for ref in refs} == {"train", "val"}
    said: dict[int, dict[str, int]] = {}
    for ref in refs:
        note = notes[ref["ann_id"]]
        assert (ref["image_id"], ref["category_id"]) == (note["image_id"], note["category_id"])
        for sentence in ref["sentences"]:
            words = sentence["tokens"]
            if name == "refcoco+":
                assert not {"at", "left", "right", "above", "below", "leftmost", "rightmost", "highest", "lowest"} & {*words}
            else:
                assert {*words} & {*COLOURS} and {*words} & {"small", "big"} and ("at" in words or len(words) > 5)
            assert said.setdefault(ref["image_id"], {}).setdefault(sentence["sent"], ref["ann_id"]) == ref["ann_id"]
