"""Octopus on real photographs and COCO's boxes, random towers: from published files to a drawn answer."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from fromage.octopus.sources import Instructions

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import real_pointing

    return real_pointing


def test_cocos_boxes_as_questions(tool, shared_data, tmp_path):
    coco = shared_data / "coco_sample"
    instances = json.loads((coco / "instances_val2017_sample.json").read_text())
    (tmp_path / "where.json").write_text(json.dumps(tool.questions(instances)))
    source = Instructions(str(tmp_path / "where.json"), str(coco / "val2017"))
    single = [note for note in instances["annotations"] if not note["iscrowd"]]
    names = {category["id"]: category["name"] for category in instances["categories"]}
    files = {image["id"]: image["file_name"] for image in instances["images"]}
    truth = Counter((files[note["image_id"]], f"where are the {names[note['category_id']]}?") for note in single)
    assert {(Path(e.image).name, e.instruction): len(e.boxes) for e in source} == truth
    assert sum(truth.values()) == len(single) and max(truth.values()) == 13


def test_the_whole_path_on_photographs(tool, shared_data, tmp_path):
    report = tool.run(shared_data, tmp_path, steps=2, judged=20)
    assert report["examples"] == 20 and "1_object" in report["octopus"]
    told = json.loads((tmp_path / "answer.json").read_text())
    width, height = told["size"]
    boxes = [each["box"] for each in told["candidates"]]
    assert len(boxes) == 16 and all(0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height for box in boxes)
    assert max(Image.open(tmp_path / "answer.png").size) >= 640
