"""Your own pairs, from a folder of images with captions to an index: own.yaml on the toy towers, in a fresh folder."""

import json
import shutil

import pytest
import torch

from fromage.cli.main import main

TOY = ["--vision", "toy"]


@pytest.fixture
def photographs(world, tmp_path, monkeypatch):
    """A folder of 60 images and captions.tsv, five lines an image, those of an image apart from each other."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "coco" / "val2017", tmp_path / "photographs")
    content = json.loads((world / "coco" / "annotations" / "captions_val2017.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    notes = sorted(content["annotations"], key=lambda note: note["id"] % 5)
    lines = [f"{note['caption']}\t{names[note['image_id']]}\n" for note in notes]
    (tmp_path / "photographs" / "captions.tsv").write_text("".join(lines))
    return tmp_path


def did(capsys, *words):
    """What a command prints."""
    capsys.readouterr()
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_from_a_folder_to_a_search(photographs, capsys):
    said = did(capsys, "shards", "tsv", "photographs/captions.tsv", "--out", "runs/own/shards", "--val-fraction", "0.3")
    assert "60 images with 300 captions packed: " in said
    train, val = (f"runs/own/shards/{side}" for side in ("train", "val"))
    found = did(capsys, "shards", "check", train, val, "--workers", "0")
    assert "60 samples: 60 usable, 0 broken\n60 images with 300 captions\n" in found and "of another" not in found
    counts = {}
    for side in ("train", "val"):
        stored = did(capsys, "features", f"runs/own/shards/{side}", "--out", f"runs/own/features/{side}", *TOY)
        counts[side] = int(stored.split()[0])
    assert counts["train"] + counts["val"] == 60
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--data.max_tokens=40"]
    did(capsys, "fit", "--config=own.yaml", "--config=debug.yaml", *quiet)
    (saved,) = photographs.glob("runs/debug/**/last.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == 4
    report = (photographs / "runs/debug/version_0/report.md").read_text()
    assert "val/t2i_r1" in report and "runs/own/features/val" in report
    said = ["--images", "photographs", "--captions", "photographs/captions.tsv"]
    did(capsys, "index", "build", "--ckpt", str(saved), *said, "--out", "runs/own/index")
    found = did(capsys, "search", "--index", "runs/own/index", "a red star.", "-k", "60")
    first = [line.partition("\t")[0] for line in (photographs / "photographs/captions.tsv").open()][:60]
    assert all(caption in found for caption in first)
