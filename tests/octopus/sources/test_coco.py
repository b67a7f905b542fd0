"""The reader of COCO's instances as a detector's examples."""

import json
from pathlib import Path

import pytest
from source_files import coco, refs_of

from fromage.errors import UserError
from fromage.octopus.boxes import reading_order
from fromage.octopus.sources import CocoObjects


def test_every_object_of_cocos_own_instances(shared_data):
    file, images = shared_data / "coco_sample" / "instances_val2017_sample.json", shared_data / "coco_sample" / "val2017"
    content = json.loads(file.read_text())
    single = [note["image_id"] for note in content["annotations"] if not note["iscrowd"]]
    source = CocoObjects(str(file), str(images))
    there = {str(image["id"]): single.count(image["id"]) for image in content["images"] if image["id"] in single}
    assert {e.key: len(e.answer) for e in source} == there
    assert source.dropped["images without an object"] == len(content["images"]) - len(there)
    assert source.dropped["boxes of crowds"] == len(content["annotations"]) - len(single)
    for example in source:
        assert example.instruction == "Detect all objects." and Path(example.image).is_file()
        assert list(example.answer) == reading_order(example.boxes) and len(example.meant) == len(example.boxes)


def test_objects_of_one_image(one):
    file, _ = one((150, 50, 40, 40), (20, 10, 20, 20), (0, 0, 200, 100), (20, 50, 20, 20), crowds=[2])
    (example,) = CocoObjects(file, "images", instruction="What is here?")
    assert (example.key, example.image, example.instruction) == ("7", str(Path("images", "seven.jpg")), "What is here?")
    assert example.boxes == ((0.75, 0.5, 0.95, 0.9), (0.1, 0.1, 0.2, 0.3), (0.1, 0.5, 0.2, 0.7))
    assert example.answer == (1, 2, 0), "from left to right, and nothing else"


def test_boxes_of_no_area_are_left_out_and_told_of(one):
    file, _ = one((0, 0, 0, 50), (20, 10, 20, 20))
    source = CocoObjects(file, "images")
    with pytest.warns(UserWarning, match=r"instances\.json: left out are 1 boxes of no area in their image"):
        (example,) = source
    assert example.answer == (0,) and example.boxes == ((0.1, 0.1, 0.2, 0.3),)


def test_images_of_too_many_objects(one):
    file, _ = one((1, 1, 9, 9), (20, 10, 20, 20), (60, 60, 9, 9))
    assert len(CocoObjects(file, "images", max_objects=3)) == 1
    with pytest.raises(UserError, match="holds no example, but 1 images of more than 2 objects"):
        len(CocoObjects(file, "images", max_objects=2))
    with pytest.raises(UserError, match="max_objects"):
        CocoObjects(file, "images", max_objects=0)


def test_images_that_are_tested_on_are_held_out(world, one, tmp_path):
    refs, file = (str(world / "refcoco" / name) for name in ("refs(unc).p", "instances.json"))
    source = CocoObjects(file, str(world / "refcoco/images"), apart_from=[refs])
    assert {e.image for e in source} == {e.image for e in coco(world)}
    assert source.dropped["images that are held out"] == len({e.image for e in coco(world, split="val")})
    instances, notes = one((0, 0, 50, 50))
    with pytest.raises(UserError, match="no example, but 1 images that are held out"):
        len(CocoObjects(instances, "images", apart_from=[refs_of(tmp_path / "refs.p", notes)]))


def test_instances_that_are_wrong(world, one, tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: cannot be read.*instances\.json"):
        list(CocoObjects(str(tmp_path / "gone.json"), "images"))
    with pytest.raises(UserError, match="captions of COCO, and not boxes of COCO"):
        list(CocoObjects(str(world / "coco/annotations/captions_val2017.json"), "images"))
    with pytest.raises(UserError, match=r"no example, but .*1 images without an object"):
        file, _ = one((0, 0, 9, 9), crowds=[0])
        list(CocoObjects(file, "images"))
    content = json.loads((world / "coco/annotations/instances_val2017.json").read_text())
    content["annotations"][1]["bbox"] = None
    (tmp_path / "odd.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"annotations\[1\]\.bbox is null, not a list\) and left out"):
        source = list(reader := CocoObjects(str(tmp_path / "odd.json"), "images"))
    assert len(source) == 59 and reader.dropped == {"odd entries": 1, "images without an object": 1}
