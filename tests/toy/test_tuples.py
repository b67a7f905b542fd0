"""Tuples of the toy world: each condition leads from the reference to the target, and to no other scene of the split."""

import json
import random
from itertools import islice

import pytest
from PIL import Image

from fromage.cli.main import main
from fromage.errors import UserError
from fromage.toy.changes import KINDS
from fromage.toy.scenes import COLOURS, PIXELS, PLACES, SIZES, Scene
from fromage.toy.tuples import LINES, make_tuples, sample_tuples


def test_a_change_is_what_its_condition_says():
    seen = set()
    made = list(islice(sample_tuples(random.Random(0), "train", 3), 100))
    for scene, (kind, condition, target) in ((one.scene, change) for one in made for change in one.changes.values()):
        words, seen = set(condition.split()), seen | {kind}
        assert target != scene and target.split == "train"
        changed, kept = set(target.things) - set(scene.things), set(scene.things) & set(target.things)
        if kind in ("time", "ground"):
            assert getattr(target, kind) in words and target.things == scene.things
            continue
        assert (target.ground, target.time) == (scene.ground, scene.time) and len(changed) == 1
        (thing,) = changed
        assert thing.shape in words and len(kept) == len(scene.things) - (kind != "add")
        for what, known in (("colour", COLOURS), ("place", PLACES), ("size", SIZES)):
            assert words & known.keys() == ({getattr(thing, what)} if kind in (what, "add") else set())
        assert len({t.place for t in target.things}) == len(target.things) <= 3
    assert seen == set(KINDS)


@pytest.mark.parametrize("changes", [1, 4])
def test_no_two_tuples_share_a_target_and_those_of_validation_are_unseen(changes):
    made = list(islice(sample_tuples(random.Random(0), "val", changes), 8))
    keys = [key for one in made for key in (one.scene.key, *one.changes)]
    assert len(set(keys)) == 8 * (1 + changes) and all(Scene.parse(key).split == "val" for key in keys)
    assert all(len({change.kind for change in one.changes.values()}) == changes for one in made)


def test_the_folder_is_the_same_for_the_same_arguments(tmp_path):
    for name in "ab":
        make_tuples(tmp_path / name, 5, "train", 2, progress=False)
    entries = [json.loads(line) for line in (tmp_path / "a" / LINES).read_text().splitlines()]
    assert len(entries) == 5
    for entry in entries:
        shown = [Image.open(tmp_path / "a" / entry[name]) for name in ("image", "target_image")]
        assert [image.size for image in shown] == [(PIXELS, PIXELS)] * 2 and shown[0].tobytes() != shown[1].tobytes()
        thing = Scene.parse(entry["target_scene"]).things[0]
        assert thing.shape in entry["target_caption"] and thing.colour in entry["target_caption"]
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()} for name in "ab"]
    assert files[0] == files[1] and len(files[0]) == 9  # three references, five targets, the lines
    assert [entry["image"] for entry in entries] == [f"images/{i:06d}.jpg" for i in (0, 0, 2, 2, 4)]
    for numbers in ({"count": 0}, {"changes": 5}):
        with pytest.raises(UserError, match="give a count from 1, changes from 1 to 4"):
            make_tuples(tmp_path / "c", **numbers)


def test_the_command_and_its_shards(tmp_path, capsys):
    out = tmp_path / "t"
    assert main(["tuples", "toy", "--out", str(out), "--count", "4"]) == 0
    assert "4 tuples (" in capsys.readouterr().out
    assert main(["tuples", "toy", "--out", str(out), "--count", "4"]) == 2
    assert main(["shards", "tuples", str(out / LINES), "--out", str(tmp_path / "s"), "--per-shard", "3"]) == 0
    assert "4 tuples packed" in capsys.readouterr().out and len(list((tmp_path / "s").glob("*.tar"))) == 2


@pytest.mark.parametrize("name", ["thesis.tex", "images/photo.jpg", "more/000000.jpg"])
def test_a_folder_with_anything_else_in_it_is_not_replaced(name, tmp_path, capsys):
    words = ["tuples", "toy", "--out", str(tmp_path / "t"), "--count", "2", "--overwrite"]
    assert main(words) == 0
    (tmp_path / "t" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "t" / name).write_text("mine")
    assert main(words) == 2
    assert "which is not of toy tuples; name another folder" in capsys.readouterr().err
    assert (tmp_path / "t" / name).read_text() == "mine"
