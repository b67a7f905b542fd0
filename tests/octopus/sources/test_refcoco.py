"""Readers of RefCOCO/+/g: what they make of the toy world's files, of COCO's own and of files that are wrong."""

import contextlib
import io
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from pycocotools.coco import COCO
from source_files import coco, refs_of

from fromage.errors import UserError
from fromage.octopus.sources import RefCOCO
from fromage.octopus.sources.file_source import with_masks
from fromage.octopus.sources.references import held_out
from fromage.toy.scenes import PIXELS


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


def test_masks_are_those_of_the_annotations_and_are_read_where_asked_for(world):
    source = coco(world)
    plain = list(source)
    assert not any(example.masks for example in plain)
    with_masks([source, "another class"])
    found = list(source)
    assert [replace(example, masks=()) for example in found] == plain
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(str(world / "refcoco/instances.json"))
    refs = {r["ref_id"]: r for r in pickle.loads((world / "refcoco/refs(unc).p").read_bytes())}
    kinds = set()
    for example in found:
        note = theirs.anns[refs[int(example.key.split(".")[0])]["ann_id"]]
        (mask,) = example.masks
        assert (mask.pixels() == theirs.annToMask(note).astype(bool)).all()
        kinds.add(type(note["segmentation"]))
    assert kinds == {list, dict} and len({id(example.masks[0]) for example in found}) < len(found), "one for its sentences"
    source.examples[0] = None
    with_masks([source])
    assert source.examples[0] is None, "not read a third time"


def test_references_with_a_damaged_segmentation_have_no_mask_and_are_told_of(one, tmp_path):
    instances, notes = one(*[(0, 0, 50, 50)] * 40)
    content = json.loads(Path(instances).read_text())
    for note in content["annotations"]:
        note["segmentation"] = [[1, 1, 40, 1, 40, 40]]
    content["annotations"][3]["segmentation"] = {"size": [100, 200], "counts": [5, 6]}
    Path(instances).write_text(json.dumps(content))
    refs = refs_of(tmp_path / "refs(unc).p", notes)
    assert len(RefCOCO(refs, instances, "images", split="val")) == 40
    source = RefCOCO(refs, instances, "images", split="val")
    with_masks([source])
    with pytest.warns(UserWarning, match="left out are 1 masks that are damaged"):
        found = list(source)
    assert len(found) == 40 and source.dropped == {"masks that are damaged": 1}, "its box is known all the same"
    assert [number for number, example in enumerate(found) if not example.masks] == [3]


def test_refcoco_reads_cocos_own_instances(shared_data, tmp_path):
    file = shared_data / "coco_sample" / "instances_val2017_sample.json"
    content = json.loads(file.read_text())
    sizes = {i["id"]: (i["width"], i["height"], i["file_name"]) for i in content["images"]}
    single = [a for a in content["annotations"] if not a["iscrowd"]]
    refs = refs_of(tmp_path / "refs(google).p", single)
    source = RefCOCO(refs, str(file), str(shared_data / "coco_sample" / "val2017"), split="val")
    with_masks([source])  # this file has none
    assert not any(example.masks for example in source) and source.dropped["masks that are not there"] == len(single)
    assert len(source) == len(single) and source.dropped["boxes of crowds"] == len(content["annotations"]) - len(single)
    for example, note in zip(source, single, strict=True):
        width, height, name = sizes[note["image_id"]]
        left, top, right, bottom = example.boxes[example.answer[0]]
        x, y, w, h = note["bbox"]
        assert (left * width, top * height) == pytest.approx((x, y), abs=1e-6)
        assert ((right - left) * width, (bottom - top) * height) == pytest.approx((w, h), abs=0.02)  # clipped by rounding
        assert Path(example.image).name == name and Path(example.image).is_file()


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


def test_images_of_other_splits_are_held_out(one, tmp_path):
    _, notes = one((0, 0, 50, 50))
    files = [
        refs_of(tmp_path / f"refs({n}).p", notes, split=split, image_id=n)
        for n, split in enumerate(("train", "testA", "val"))
    ]
    assert held_out(files) == {1, 2} and held_out([]) == set()
    with pytest.raises(UserError, match=r"gone\.p: cannot be read"):
        held_out([str(tmp_path / "gone.p")])
    Path(files[0]).write_bytes(pickle.dumps([{"split": "val"}]))
    with pytest.raises(UserError, match=r"references\[0\] lacks image_id"):
        held_out(files)


def test_images_that_another_data_set_tests_on_are_not_trained_on(world, tmp_path):
    refs, rest = world / "refcoco" / "refs(unc).p", (str(world / "refcoco/instances.json"), str(world / "refcoco/images"))
    whole = RefCOCO(str(refs), *rest)
    notes = pickle.loads(refs.read_bytes())
    barred = next(note["image_id"] for note in notes if note["split"] == "train")
    other = [{**note, "split": "val" if note["image_id"] == barred else "train"} for note in notes]
    (tmp_path / "other.p").write_bytes(pickle.dumps(other))
    fewer = RefCOCO(str(refs), *rest, apart_from=[str(tmp_path / "other.p")])
    there = {note["ref_id"] for note in notes if note["image_id"] == barred}
    assert (
        {e.key for e in whole} - {e.key for e in fewer}
        == {e.key for e in whole if int(e.key.split(".")[0]) in there}
        != set()
    )
    assert fewer.dropped["images that are held out"] == 1 and not fewer.odd
