"""fromage caption: what it takes, what it prints, and images that have none."""

import json
import subprocess
import sys

import pytest

from fromage.cli.main import main

EVIL = "\x1b]0;owned\x07\x1b[2J"


@pytest.fixture(scope="module")
def ckpt(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    model.save_pretrained(out, "float32")
    return str(out)


def said(capsys, *words, code=0):
    capsys.readouterr()
    assert main(["caption", *map(str, words)]) == code
    return capsys.readouterr()


def test_files_and_folders_get_a_line_each_the_same_in_any_batch(ckpt, model, folder, capsys):
    out = said(capsys, folder, folder / "red.png", "--ckpt", ckpt, "--max-new-tokens", "5", "--batch-size", "4").out
    images = [*sorted(folder.glob("*.png")), folder / "red.png"]
    wanted = model.caption([str(image) for image in images], 5)
    assert out.splitlines() == [f"{image}\t{text}" for image, text in zip(images, wanted, strict=True)]


def test_a_damaged_image_is_named_counted_and_left_without(ckpt, folder, tmp_path, capsys):
    (tmp_path / f"{EVIL}.jpg").write_bytes(b"no image")
    (tmp_path / "words.txt").write_text("no image by its name")
    told = said(capsys, tmp_path, folder / "red.png", "--ckpt", ckpt, "--max-new-tokens", "3", "--json")
    first, second = map(json.loads, told.out.splitlines())
    assert first["caption"] is None and "undecodable" in first["error"] and second["image"].endswith("red.png")
    assert "warning: 1 of 2 images have no caption" in told.err and "\x1b" not in told.err + told.out
    assert "1 of 1 images have no caption" in said(capsys, tmp_path, "--ckpt", ckpt, code=2).err


def test_what_is_no_image_and_no_url_within_reach(ckpt, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "holds no image" in said(capsys, tmp_path / "empty", "--ckpt", ckpt, code=2).err
    assert "127.0.0.1" in said(capsys, "http://127.0.0.1:9/a.png", "--ckpt", ckpt, code=2).err


def test_a_language_model_that_is_loaded_is_named_on_standard_error(ckpt, folder):
    words = [sys.executable, "-m", "fromage", "caption", str(folder / "red.png"), "--ckpt", ckpt, "--max-new-tokens", "2"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["loading toy ..."] and done.stdout.count("\n") == 1
