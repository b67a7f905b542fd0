"""Readers of published files: what they make of the toy world's, of COCO's own and of files that are wrong."""

import json
import os
import pickle
import random
import re
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from PIL import Image

from fromage.errors import UserError
from fromage.octopus.boxes import clipped, read_spelled, reading_order, share, spelled
from fromage.octopus.examples import Source
from fromage.octopus.sources import Flickr30kEntities, Instructions, Pope, RefCOCO
from fromage.toy.questions import in_order
from fromage.toy.scenes import PIXELS, Scene, draw, sample_crowded_scene, sample_scenes


def coco(world: Path, **options) -> RefCOCO:
    folder = world / "refcoco"
    return RefCOCO(str(folder / "refs(unc).p"), str(folder / "instances.json"), str(folder / "images"), **options)


def entities(world: Path, **options) -> Flickr30kEntities:
    return Flickr30kEntities(str(world / "flickr30k_entities"), str(world / "refcoco/images"), **options)


def write(path: Path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


# boxes


def test_shares_are_clipped_to_the_image():
    assert share(10, 20, 30, 60, 100, 200) == (0.1, 0.1, 0.3, 0.3)
    assert share(-5, 190, 30, 260, 100, 200) == (0.0, 0.95, 0.3, 1.0)


@pytest.mark.parametrize(
    "sides",
    [(10, 10, 10, 20), (10, 10, 20, 10), (30, 10, 20, 20), (101, 0, 120, 10), (-9, 0, 0, 5), (float("nan"), 0, 5, 5)],
)
def test_a_box_without_area_in_the_image_is_none(sides):
    assert share(*sides, 100, 100) is None


def test_spelled_boxes_read_back():
    rng = random.Random(0)
    for _ in range(100):
        box = clipped(*(rng.uniform(-0.2, 1.2) for _ in range(4)))
        if box:
            (found,) = read_spelled(spelled(box))
            assert found == pytest.approx(box, abs=0.0005)
    assert spelled((0.1234, 0.5, 0.75, 1.0)) == "[0.123,0.500,0.750,1.000]"


def test_reading_order_of_drawn_scenes_is_that_of_their_places():
    for i, scene in enumerate(sample_scenes(random.Random(0), "train", 100, sample_crowded_scene)):
        boxes = [share(x, y, x + w, y + h, PIXELS, PIXELS) for (x, y, w, h), _ in draw(scene, i)[1]]
        assert reading_order(boxes) == in_order(scene, range(len(boxes)))


def test_reading_order_does_not_depend_on_the_order_given():
    rng = random.Random(1)
    boxes = [(x, y, x + 0.1, y + 0.1) for x, y in ((rng.uniform(0, 0.9), rng.uniform(0, 0.9)) for _ in range(9))]
    mixed = rng.sample(boxes, 9)
    assert [boxes[i] for i in reading_order(boxes)] == [mixed[i] for i in reading_order(mixed)]


# RefCOCO


@pytest.mark.parametrize("split", ["train", "val"])
def test_refcoco_points_at_what_the_annotation_says(world, split):
    found = list(coco(world, split=split))
    refs = [r for r in pickle.loads((world / "refcoco/refs(unc).p").read_bytes()) if r["split"] == split]
    content = json.loads((world / "refcoco/instances.json").read_text())
    notes, names = {a["id"]: a for a in content["annotations"]}, {i["id"]: i["file_name"] for i in content["images"]}
    said = [(ref, s["sent"]) for ref in refs for s in ref["sentences"]]
    assert len(found) == len(said) == len({e.key for e in found})
    for example, (ref, text) in zip(found, said, strict=True):
        x, y, w, h = notes[ref["ann_id"]]["bbox"]
        (number,) = example.answer
        assert example.boxes[number] == pytest.approx((x / PIXELS, y / PIXELS, (x + w) / PIXELS, (y + h) / PIXELS))
        assert len(example.boxes) == sum(a["image_id"] == ref["image_id"] for a in notes.values())
        assert example.instruction == f"where is {text}?"
        assert example.image == str(world / "refcoco/images" / names[ref["image_id"]]) and Path(example.image).is_file()


def test_refcoco_question_and_limit(world):
    few = coco(world, question="point at {}", limit=3)
    assert len(few) == 3 and all(e.instruction.startswith("point at the ") for e in few)
    assert [e.key for e in few] == [e.key for e in coco(world)][:3]


def test_refcoco_only_what_matches(world):
    every, some = coco(world), coco(world, match=r"\b(left|right) of\b")
    said = [e.key for e in every if "left of" in e.instruction or "right of" in e.instruction]
    assert [e.key for e in some] == said and 0 < len(said) < len(every)
    assert some.dropped["expressions that do not match"] == len(every) - len(said)
    with pytest.raises(UserError, match="regular expression"):
        coco(world, match="(left")
    with pytest.raises(UserError, match=r"no example, but .* do not match"):
        len(coco(world, match="zebra"))


def refs_of(path: Path, notes: list[dict], protocol: int = 2, **change) -> str:
    made = [
        {"ref_id": n, "ann_id": a["id"], "image_id": a["image_id"], "category_id": a["category_id"], "split": "val"}
        | {"sentences": [{"sent": f"thing {n}", "raw": "Thing", "tokens": ["thing"], "sent_id": n}], "sent_ids": [n]}
        | change
        for n, a in enumerate(notes)
    ]
    path.write_bytes(pickle.dumps(made, protocol))
    return str(path)


def test_refcoco_reads_cocos_own_instances(shared_data, tmp_path):
    file = shared_data / "coco_sample" / "instances_val2017_sample.json"
    content = json.loads(file.read_text())
    sizes = {i["id"]: (i["width"], i["height"], i["file_name"]) for i in content["images"]}
    single = [a for a in content["annotations"] if not a["iscrowd"]]
    refs = refs_of(tmp_path / "refs(google).p", single)
    source = RefCOCO(refs, str(file), str(shared_data / "coco_sample" / "val2017"), split="val")
    assert len(source) == len(single) and source.dropped["boxes of crowds"] == len(content["annotations"]) - len(single)
    for example, note in zip(source, single, strict=True):
        width, height, name = sizes[note["image_id"]]
        left, top, right, bottom = example.boxes[example.answer[0]]
        x, y, w, h = note["bbox"]
        assert (left * width, top * height) == pytest.approx((x, y), abs=1e-6)
        assert ((right - left) * width, (bottom - top) * height) == pytest.approx((w, h), abs=0.02)  # clipped by rounding
        assert Path(example.image).name == name and Path(example.image).is_file()


@pytest.fixture
def one(tmp_path):
    """An image of 200 x 100 pixels with the boxes given: the file of instances, and the notes."""

    def make(*boxes, crowds=()):
        notes = [{"id": n, "image_id": 7, "category_id": 1, "bbox": list(b), "iscrowd": 0} for n, b in enumerate(boxes)]
        for n in crowds:
            notes[n]["iscrowd"] = 1
        images = [{"id": 7, "file_name": "seven.jpg", "width": 200, "height": 100}]
        content = {"images": images, "annotations": notes, "categories": [{"id": 1, "name": "thing"}]}
        return write(tmp_path / "instances.json", content), notes

    return make


def test_boxes_outside_or_without_area_are_left_out_with_their_references(one, tmp_path):
    instances, notes = one(
        (0, 0, 0, 50), (-20, -10, 120, 60), (250, 0, 20, 20), (150, 50, 100, 100), (1, 1, 9, 9), crowds=[4]
    )
    source = RefCOCO(refs_of(tmp_path / "refs(unc).p", notes), instances, "images", split="val")
    with pytest.warns(UserWarning, match=r"refs\(unc\)\.p: left out are .*2 boxes of no area.*3 examples"):
        found = list(source)
    assert [e.instruction for e in found] == ["where is thing 1?", "where is thing 3?"]
    assert [e.answer for e in found] == [(0,), (1,)]
    assert found[0].boxes == found[1].boxes == ((0.0, 0.0, 0.5, 0.5), (0.75, 0.5, 1.0, 1.0))


@pytest.mark.parametrize(
    ("change", "what"), [({"image_id": 8}, "image 8"), ({"category_id": 5}, "category 5"), ({"ann_id": 99}, "annotation 99")]
)
def test_references_of_another_data_set(one, tmp_path, change, what):
    instances, notes = one((0, 0, 50, 50))
    source = RefCOCO(refs_of(tmp_path / "refs(unc).p", notes, **change), instances, "images", split="val")
    with pytest.raises(UserError, match=f"{what}.*instances.json does not hold"):
        list(source)


@pytest.mark.parametrize("protocol", range(5))
def test_refcoco_pickles_run_nothing(one, tmp_path, protocol):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    instances, notes = one((0, 0, 50, 50))
    refs = refs_of(tmp_path / "refs(unc).p", notes, protocol, split=Malicious())
    with pytest.raises(UserError, match=r"refs\(unc\)\.p: .*asks for .*mkdir"):
        list(RefCOCO(refs, instances, "images", split="val"))
    assert not (tmp_path / "made").exists()


def test_refcoco_texts_of_python_2(one, tmp_path):
    instances, notes = one((0, 0, 50, 50))
    refs = Path(refs_of(tmp_path / "refs(unc).p", notes, 0))
    refs.write_bytes(refs.read_bytes().replace(b"Vthing 0\n", b"S'caf\\xc3\\xa9'\n"))
    (example,) = RefCOCO(str(refs), instances, "images", split="val")
    assert example.instruction == "where is café?"


def test_refcoco_files_that_are_wrong(one, tmp_path, world):
    instances, notes = one((0, 0, 50, 50))
    refs = refs_of(tmp_path / "refs(unc).p", notes)
    with pytest.raises(UserError, match="no split testA; there are val"):
        list(RefCOCO(refs, instances, "images", split="testA"))
    with pytest.raises(UserError, match=r"nothing\.p: cannot be read"):
        list(RefCOCO(str(tmp_path / "nothing.p"), instances, "images"))
    with pytest.raises(UserError, match="is not a list of references"):
        list(RefCOCO(instances, instances, "images"))
    with pytest.raises(UserError, match="captions of COCO, and not boxes of COCO"):
        list(RefCOCO(refs, str(world / "coco/annotations/captions_val2017.json"), "images", split="val"))
    broken, _ = one((0, 0, 50))
    with pytest.raises(
        UserError, match=r"instances\.json: 1 of 1 entries are odd \(annotations\[0\]\.bbox is a list of 3, not of 4"
    ):
        list(RefCOCO(refs, broken, "images", split="val"))
    with pytest.raises(UserError, match=r"must hold .* once"):
        RefCOCO(refs, instances, "images", question="where?")
    with pytest.raises(UserError, match="limit"):
        RefCOCO(refs, instances, "images", limit=0)


# Flickr30k Entities


@pytest.mark.parametrize("split", ["train", "val"])
def test_entities_of_the_toy_world_lie_where_refcoco_has_them(world, split):
    boxes = {e.image: e.boxes for e in coco(world, split=split)}
    source = entities(world, split=split)
    assert {e.image for e in source} == set(boxes) and len({e.key for e in source}) == len(source)
    assert source.dropped["phrases without a box"] == 2 * 5 * len(boxes)  # the ground and the time in each sentence
    several = 0
    for example in source:
        for box, there in zip(example.boxes, boxes[example.image], strict=True):
            assert box == pytest.approx(there, abs=0.51 / PIXELS)
        first = re.match(r"where is (\w+) .*\?", example.instruction)[1]
        assert len(example.answer) == {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}[first]
        several += len(example.answer) > 1
        pointed = [example.boxes[number] for number in example.answer]
        assert reading_order(pointed) == list(range(len(pointed)))
    assert several


SENTENCE = (
    "[/EN#1/people/other Two men] sit in [/EN#2/scene the yard] with [/EN#3/animals a dog] and [/EN#0/notvisual fun] ."
)
OBJECT = "<object>{names}<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def annotate(folder: Path, *objects, size=(200, 100)) -> Flickr30kEntities:
    """An image whose objects are (entities, xmin, ymin, xmax, ymax)."""
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "val.txt").write_text("12\n")
    (folder / "Sentences/12.txt").write_text(SENTENCE + "\nNothing here .\n")
    named = ["".join(f"<name>{n}</name>" for n in names) for names, *_ in objects]
    listed = "".join(OBJECT.format(*sides, names=n) for n, (_, *sides) in zip(named, objects, strict=True))
    listed += "<object><name>2</name><scene>1</scene><nobndbox>0</nobndbox></object>"
    width, height = size
    sides = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    (folder / "Annotations/12.xml").write_text(f"<annotation><filename>12.jpg</filename>{sides}{listed}</annotation>")
    return Flickr30kEntities(str(folder), "images", "val")


def test_entities_as_published(tmp_path):
    source = annotate(tmp_path, ("1", 151, 1, 200, 100), ("3", 101, 51, 120, 60), ("15", 1, 1, 50, 100))
    men, dog = source
    assert (men.instruction, dog.instruction) == ("where is Two men?", "where is a dog?")
    assert men.boxes == dog.boxes == ((0.75, 0.0, 1.0, 1.0), (0.5, 0.5, 0.6, 0.6), (0.0, 0.0, 0.25, 1.0))
    assert men.answer == (2, 0) and dog.answer == (1,)  # in reading order
    assert men.image == str(Path("images", "12.jpg")) and source.dropped == {"phrases without a box": 2}


def test_entities_without_area(tmp_path):
    source = annotate(tmp_path, ("1", 151, 1, 200, 100), ("1", 300, 1, 310, 20), ("3", 180, 0, 999, 60))
    with pytest.warns(UserWarning, match="1 boxes of no area"):
        (dog,) = source
    assert dog.boxes[dog.answer[0]] == (179 / 200, 0.0, 1.0, 0.6)
    assert source.dropped["examples that point at such a box"] == 1


def test_entities_by_a_list_of_ids(world, tmp_path):
    chosen = (world / "flickr30k_entities/val.txt").read_text().split()[:2]
    (tmp_path / "mine.txt").write_text("\n".join(chosen))
    assert {Path(e.image).stem for e in entities(world, split=str(tmp_path / "mine.txt"))} == set(chosen)


def test_entities_that_are_wrong(world, tmp_path):
    with pytest.raises(UserError, match=r"tset\.txt: cannot be read.*its split"):
        list(entities(world, split="tset"))
    source = annotate(tmp_path, ("1", 1, 1, 5, 5))
    (tmp_path / "Annotations/12.xml").write_text("<annotation>")
    with pytest.raises(UserError, match=r"1 of 1 entries.*12\.xml: is no XML, or broken in line 1, column 12"):
        list(source)
    with pytest.raises(UserError, match=r"12\.xml: size/width is 0"):
        list(annotate(tmp_path, ("1", 1, 1, 5, 5), size=(0, 100)))
    (tmp_path / "Annotations/12.xml").unlink()
    with pytest.raises(UserError, match=r"12\.xml: cannot be read.*Annotations"):
        list(Flickr30kEntities(str(tmp_path), "images", "val"))
    with pytest.raises(UserError, match="holds no example, but 4 phrases without a box"):
        list(annotate(tmp_path))


# Instructions


@pytest.mark.parametrize("split", ["train", "val"])
def test_instructions_of_the_toy_world(world, split):
    file = world / f"llava/instruct_{split}.json"
    found = list(Instructions(str(file), str(world)))
    lines = [turn["value"] for entry in json.loads(file.read_text()) for turn in entry["conversations"]]
    assert len(found) == len(lines) / 2 == len({e.key for e in found})
    for example, asked, told in zip(found, lines[::2], lines[1::2], strict=True):
        assert "<image>" not in example.instruction and example.instruction in asked
        texts = [piece if isinstance(piece, str) else spelled(example.boxes[piece]) for piece in example.answer]
        assert "".join(texts) == told
        assert sorted(example.meant) == list(range(len(example.boxes)))
        assert Path(example.image).is_file()
        pointed = [example.boxes[number] for number in example.answer if isinstance(number, int)]
        assert reading_order(pointed) == list(range(len(pointed)))
    assert max(len(e.boxes) for e in found) > 1
    assert len(Instructions(str(world / f"llava/pretrain_{split}.json"), str(world))) > len({e.image for e in found})


def talk(*turns, image="a.jpg", **more) -> dict:
    lines = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=False)]
    return {"id": "x", "image": image, "conversations": lines} | more


def instructions(folder: Path, *entries, **options) -> Instructions:
    return Instructions(write(folder / "talks.json", list(entries)), str(folder), **options)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("A cat [0.1, 0.2, 0.3, 0.4].", ("A cat ", 0, ".")),
        ("[0.100,0.200,0.300,0.400]", (0,)),
        ("[0.5,0.2,0.6,0.4;0.1,0.2,0.3,0.4]", (0, 1)),
        ("a [0.1,0.2,0.3,0.4] on b [0.0,0.0,1.0,1.0], so a [0.1,0.2,0.3,0.4]", ("a ", 0, " on b ", 1, ", so a ", 0)),
        ("the list [1, 2, 3, 4] and [0.1, 0.2] stay", ("the list [1, 2, 3, 4] and [0.1, 0.2] stay",)),
    ],
)
def test_boxes_in_answers_become_numbers(tmp_path, text, answer):
    (example,) = instructions(tmp_path, talk(("where? [0.1,0.2,0.3,0.4]\n<image>", f" {text} ")))
    assert example.answer == answer
    assert example.instruction == "where? [0.1,0.2,0.3,0.4]"
    if 0 in answer:
        assert (0.1, 0.2, 0.3, 0.4) in example.boxes
    assert len(example.boxes) == len({piece for piece in answer if isinstance(piece, int)})


def test_turns_are_examples_of_their_own(tmp_path):
    entries = [talk(("<image>\nfirst?", "one"), ("second?", "two")), talk(("<image>\nthird?", "three"))]
    found = list(instructions(tmp_path, *entries))  # both entries have the id x, as some of LLaVA's have
    assert [e.instruction for e in found] == ["first?", "second?", "third?"] and len({e.key for e in found}) == 3


def test_what_is_no_instruction_about_an_image_is_counted(tmp_path):
    text_only = {"id": "t", "conversations": talk(("hello?", "hi"))["conversations"]}
    odd = talk(("<image>\nwhat?", "this"), ("and?",))
    swapped = {"id": "s", "image": "a.jpg", "conversations": talk(("q", "a"))["conversations"][::-1]}
    pixels = talk(("where?", "[12.0,30.5,50.0,60.0]"), ("really?", "yes"))
    source = instructions(tmp_path, text_only, talk(("q", "a"), image=["a.jpg", "b.jpg"]), odd, swapped, pixels)
    with pytest.warns(UserWarning, match="left out are"):
        assert [e.instruction for e in source] == ["what?", "really?"]
    assert source.dropped == {
        "entries without an image, or of several": 2,
        "turns that are no question and answer": 2,
        "boxes of no area in their image": 1,
        "examples that point at such a box": 1,
    }


def test_boxes_of_the_padded_image(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.jpg")  # padded by 50 pixels above and below
    entry = talk(("where?", "[0.25,0.25,0.5,0.5] [0.25,0.1,0.5,0.5]"))
    (plain,), (padded,) = instructions(tmp_path, entry), instructions(tmp_path, entry, padded=True)
    assert plain.boxes[0] == (0.25, 0.25, 0.5, 0.5)
    assert padded.boxes[0] == (0.25, 0.0, 0.5, 0.5) and padded.answer == (0, " ", 0)  # what lay in the margin is cut off


def test_instructions_that_are_wrong(world, tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: cannot be read"):
        list(Instructions(str(tmp_path / "gone.json"), "images"))
    with pytest.raises(UserError, match="is boxes of COCO, and not instructions of LLaVA"):
        list(Instructions(str(world / "refcoco/instances.json"), "images"))
    with pytest.raises(UserError, match=r"talks\.json: 1 of 2 entries are odd \(entries\[1\] lacks conversations"):
        list(instructions(tmp_path, talk(("q", "a")), {"image": "a.jpg"}))
    with pytest.raises(UserError, match="holds no example, but 1 entries without an image"):
        list(instructions(tmp_path, talk(("q", "a"), image=None)))


# POPE


def test_pope_of_the_toy_world_is_true_of_its_scenes(world):
    content = json.loads((world / "refcoco/instances.json").read_text())
    scenes = {i["file_name"]: Scene.parse(i["scene"]) for i in content["images"]}
    found = list(Pope(str(world / "pope/val.json"), str(world / "refcoco/images")))
    assert [e.answer for e in found].count(("yes",)) == len(found) / 2 and {e.answer for e in found} == {("yes",), ("no",)}
    for example in found:
        said = set(re.findall(r"\w+", example.instruction)) - {"is", "there", "a", "an", "at", "the"}
        things = scenes[Path(example.image).name].things
        there = any(said <= {t.shape, t.colour, t.size, t.place} for t in things)
        assert example.answer == (("yes",) if there else ("no",)) and not example.boxes


def test_pope_that_is_wrong(tmp_path):
    row = {"question_id": 1, "image": "a.jpg", "text": "is there a dog?", "label": "no"}
    (tmp_path / "pope.json").write_text(json.dumps(row) + "\n\n" + json.dumps(row | {"label": "maybe"}))
    with pytest.raises(UserError, match="the label maybe, not yes or no"):
        list(Pope(str(tmp_path / "pope.json"), "images"))
    for text, why in (
        ("[", "is no JSON, or broken in line 1, column 2"),
        (json.dumps({"image": "a.jpg"}), "lacks question_id"),
    ):
        (tmp_path / "pope.json").write_text(text)
        with pytest.raises(UserError, match=rf"pope\.json: 1 of 1 entries are odd \(line 1 {why}"):
            list(Pope(str(tmp_path / "pope.json"), "images"))
    with pytest.raises(UserError, match="cannot be read"):
        list(Pope(str(tmp_path / "gone.json"), "images"))


# all of them


def test_configurations_build_them_without_reading(tmp_path):
    parser = ArgumentParser()
    parser.add_argument("--train", type=list[Source])
    gone = str(tmp_path / "gone")
    named = {
        "RefCOCO": {"refs": gone, "instances": gone, "images": gone, "split": "testA"},
        "Flickr30kEntities": {"folder": gone, "images": gone},
        "Instructions": {"file": gone, "images": gone, "padded": True},
        "Pope": {"file": gone, "images": gone, "limit": 5},
    }
    listed = [{"class_path": f"fromage.octopus.sources.{name}", "init_args": args} for name, args in named.items()]
    made = parser.instantiate_classes(parser.parse_object({"train": listed})).train
    assert [type(source).__name__ for source in made] == list(named)
    for source in made:
        with pytest.raises(UserError, match=r"gone.*cannot be read"):
            len(source)
