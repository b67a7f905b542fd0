"""Every command on a vision tower of each kind: features, training, export, index, search, tables, plans, Octopus."""

import json
import re

import pytest
import torch

from fromage.cli.main import main
from fromage.models.fromage import load_model
from fromage.models.vision.registry import load_patches, load_vision
from fromage.octopus.model import Octopus

pytestmark = pytest.mark.filterwarnings("always")
KINDS = ("open_clip", "timm", "hf")
SHORT = ["--config=toy.yaml", "--data.val_shards=null", "--data.batch_size=8", "--trainer.max_steps=2",
         "--trainer.val_check_interval=null", "--trainer.enable_progress_bar=false"]  # fmt: skip


def do(capsys, *words, code=0):
    """Run a command, whose exit code is to be this; what it printed."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    return capsys.readouterr()


@pytest.fixture(scope="module")
def small(world):
    """A shard and a caption file of the toy world's 60 unseen scenes, and the folder of their images."""
    coco = world / "coco"
    return world / "cc3m" / "val", coco / "annotations" / "captions_val2017.json", coco / "val2017"


@pytest.mark.parametrize("kind", KINDS)
def test_from_features_to_search(towers, kind, small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shards, captions, images = small
    do(capsys, "features", shards, "--out", "features", "--vision", towers[kind], "--device", "cpu")
    with_features = [f"--model.vision={towers[kind]}", "--data.train_shards=features"]
    do(capsys, "fit", *SHORT, *with_features, "--model.vision_weights=openai")  # the default; a tag means nothing here
    do(capsys, "export", "--ckpt", "runs/toy", "--out", "model")
    assert load_model("model").vision.name == towers[kind] == load_model("runs/toy").config.vision
    do(capsys, "index", "build", "--images", images, "--ckpt", "model", "--out", "index")
    found = json.loads(do(capsys, "search", "a red circle", "--index", "index", "-k", "2", "--json").out)
    assert [hit["rank"] for hit in found["hits"]] == [1, 2]
    assert do(capsys, "caption", next(images.glob("*.jpg")), "--ckpt", "model", "--max-new-tokens", "3").out.strip()
    table = do(capsys, "eval", "coco", captions, "--images", images, "--ckpt", "model", "--limit", "4")
    told = f"warning: {towers[kind]} has no text tower: no CLIP baseline"
    assert (told in table.err.splitlines()) == (kind == "timm") == ("no CLIP baseline" in table.out)
    rows = {line.split()[1] for line in table.out.splitlines() if re.match("text_to_image +[a-z]", line)}
    assert rows == ({"fromage", "chance"} if kind == "timm" else {"fromage", "clip", "chance"})


@pytest.mark.parametrize("kind", KINDS)
def test_plans_are_of_the_tower(towers, kind, capsys):
    for config in ("cc3m.yaml", "octopus_toy1.yaml"):
        words = ["plan", "--config", config, "--lm", "toy", "--vision", towers[kind], "--batch-size", "2", "--json"]
        planned = json.loads(do(capsys, *words).out)
        tower = (load_patches if config.startswith("octopus") else load_vision)(towers[kind])
        assert planned["parameters"]["vision tower"] == sum(p.numel() for p in tower.parameters())
        assert planned["flop"] > 0
    told = do(capsys, "plan", "--config", "cc3m.yaml", "--vision", f"{kind}:none/such", code=2).err
    assert re.fullmatch(f"fromage: vision tower {kind}:none/such.*\n", told)


@pytest.mark.parametrize("kind", KINDS)
def test_octopus_reads_patches_of_each(towers, kind):
    torch.manual_seed(0)
    model = Octopus.load(vision=towers[kind], num_queries=4, decoder_layers=1, decoder_width=32, heads=2)
    patches = model.vision(torch.zeros(2, 3, *model.vision.image_size, dtype=torch.uint8))
    assert patches.shape == (2, *model.vision.shape) and model.visual_prefix(patches).shape == (2, model.k, model.lm.width)


@pytest.mark.parametrize("where", ["fit", "index"])
def test_features_of_another_width_are_one_line(towers, where, small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    do(capsys, "features", small[0], "--out", "features", "--vision", towers["timm"], "--device", "cpu")
    (record,) = (path for path in (tmp_path / "features").glob("*.json") if path.name != "sizes.json")
    fit = ["fit", *SHORT, f"--model.vision={towers['hf']}", "--data.train_shards=features"]
    if where == "index":
        do(capsys, "fit", *SHORT, f"--model.vision={towers['hf']}", f"--data.train_shards={small[0]}")
    for keep in (True, False):  # with the record of the tower, and without it
        if not keep:
            record.unlink()
        words = fit if where == "fit" else ["index", "build", "--images", "features", "--ckpt", "runs/toy", "--out", "index"]
        lines = [line for line in do(capsys, *words, code=2).err.splitlines() if line.startswith("fromage: ")]
        assert len(lines) == 1, lines
        assert re.search("tower 'timm:.* there, 'hf:.* here" if keep else "another width|wide, not", lines[0]), lines
