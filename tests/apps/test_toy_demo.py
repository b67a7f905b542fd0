import json

from PIL import Image

from fromage.apps.tours import time_left
from fromage.apps.toy_demo import PARTS, PRESET, demo
from fromage.generation.chat import Chat
from fromage.generation.styles import STYLES
from fromage.models.fromage import load_model
from fromage.toy.scenes import Scene, names_colour_and_shape


def test_the_tour_runs_and_leaves_report_and_image(tmp_path, capsys):
    options = [
        "--trainer.max_steps=3",
        "--trainer.val_check_interval=3",
        "--data.batch_size=32",
        "--trainer.enable_progress_bar=false",
    ]
    report = demo(tmp_path / "demo", pairs=100, scenes=30, options=options)
    assert report == json.loads((tmp_path / "demo" / "report.json").read_text())
    recalls = {f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)}
    assert set(report["fromage"]) == set(report["clip"]) == recalls and report["gallery"] == 30
    assert report["clip"]["t2i_r1"] > 50, "the toy CLIP knows its world"
    assert {"train", "after_install"} <= set(report["seconds"]) and 0 <= report["captions_right"] <= 100
    assert Image.open(tmp_path / "demo" / "searches.png").width > 400
    preset = Chat(load_model(tmp_path / "demo" / "k4" / "checkpoints" / "last.ckpt"))
    assert preset.style is STYLES["alone"] and preset.decoding == PRESET.decoding, "the first chat works"
    out = capsys.readouterr().out
    assert "recall in %" in out and out.count(" s left") == len(PARTS) == len(report["seconds"]) - 1


def test_time_left_follows_the_pace_so_far():
    usual = {"a": 10, "b": 20, "c": 30}
    assert time_left({}, usual) == 60 and time_left({"a": 20.0}, usual) == 100
    assert time_left({"a": 5.0, "b": 10.0, "c": 15.0}, usual) == 0


def test_a_caption_must_name_the_colour_and_shape_and_no_other():
    scene = Scene.parse("small-red-star-left@sand-night")
    assert names_colour_and_shape("a small red star, on the sand.", scene)
    assert not names_colour_and_shape("a small red ring, on the sand.", scene)
    assert not names_colour_and_shape("a red star and a blue star.", scene)
    assert not names_colour_and_shape("a star.", scene)
