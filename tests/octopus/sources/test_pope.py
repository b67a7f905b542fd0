"""The reader of POPE's questions."""

import json
import re
from pathlib import Path

import pytest

from fromage.errors import UserError
from fromage.octopus.sources import Pope
from fromage.toy.scenes import Scene


def test_attributes_of_the_toy_world_are_true_of_its_scenes(world):
    content = json.loads((world / "refcoco/instances.json").read_text())
    scenes = {i["file_name"]: Scene.parse(i["scene"]) for i in content["images"]}
    found = list(Pope(str(world / "attributes/val.json"), str(world / "refcoco/images")))
    assert [e.answer for e in found].count(("yes",)) == len(found) / 2 and {e.answer for e in found} == {("yes",), ("no",)}
    for example in found:
        said = set(re.findall(r"\w+", example.instruction)) - {"is", "there", "a", "an", "at", "the"}
        things = scenes[Path(example.image).name].things
        there = any(said <= {t.shape, t.colour, t.size, t.place} for t in things)
        assert example.answer == (("yes",) if there else ("no",)) and not example.boxes


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_popes_three_splits_are_files_and_kinds(world, split):
    source = Pope(str(world / f"pope/coco_pope_{split}.json"), str(world / "refcoco/images"))
    assert {e.key for e in source} == set(source.kinds) and set(source.kinds.values()) == {f"coco_pope_{split}"}
    assert all(re.fullmatch(r"is there an? \w+\?", e.instruction) and Path(e.image).is_file() for e in source)
    assert [e.answer for e in source].count(("yes",)) == len(source) / 2


def test_questions_keep_their_kind(world, tmp_path):
    file = world / "attributes/val.json"
    source = Pope(str(file), str(world / "refcoco/images"))
    wanted = {str(row["question_id"]): row["category"] for row in map(json.loads, file.read_text().splitlines())}
    assert len(source) == len(wanted) and source.kinds == wanted
    row = {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the image?"}
    rows = [row | {"label": "yes"}, row | {"question_id": 2, "label": "no", "category": "adversarial"}]
    rows += [row | {"question_id": 3, "label": "no", "category": None}]
    (tmp_path / "coco_pope_popular.json").write_text("\n".join(map(json.dumps, rows)))
    source = Pope(str(tmp_path / "coco_pope_popular.json"), "val2014")
    assert [e.instruction for e in source] == [row["text"]] * 3
    assert source.kinds == {"1": "coco_pope_popular", "2": "adversarial", "3": "coco_pope_popular"}


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


def test_files_put_together_whose_questions_share_ids_are_refused(tmp_path):
    """Else the kinds of the last file would stand for all."""
    rows = [
        {"question_id": i, "image": "a.jpg", "text": "Is there a dog?", "label": "yes", "category": kind}
        for kind in ("random", "popular")
        for i in range(3)
    ]
    file = tmp_path / "all.json"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"3 of 6 entries are odd .*line 4 has the question_id 0, which another has"):
        list(Pope(str(file), str(tmp_path)))
    file.write_text("\n".join(map(json.dumps, rows[:3] * 2)))
    assert set(Pope(str(file), str(tmp_path)).kinds) <= {"0", "1", "2"}
