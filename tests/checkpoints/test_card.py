"""The model card: what it tells of a run, and what of strangers' files and of this machine it does not."""

import json
import math

import pytest
import torch
import yaml

from fromage.checkpoints.card import about_data, about_run, checked, fromage_card, octopus_card
from fromage.checkpoints.format import CARD, CONFIG, read_folder
from fromage.checkpoints.load import read_saved
from fromage.cli.main import main
from fromage.errors import UserError
from fromage.models.fromage import Fromage, load_model

SIZES = {"lm": "facebook/opt-125m", "vision": "ViT-B-32", "k": 1, "q": 8}


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """The checkpoint of two steps of toy.yaml."""
    out = tmp_path_factory.mktemp("secret user")
    words = [f"--data.{part}_shards={world / 'cc3m' / part}" for part in ("train", "val")]
    words += ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.batch_size=8", "--model.q=16"]
    words += [f"--trainer.logger.init_args.save_dir={out}", "--trainer.enable_progress_bar=false"]
    words += ["--trainer.limit_val_batches=2", "--model.shown=0"]
    words += ["--trainer.callbacks.init_args.every_n_train_steps=1"]  # of step 2 too, before its validation
    assert main(["fit", "--config", "toy.yaml", *words]) == 0
    return next(out.glob("**/last.ckpt"))


def test_an_export_for_sentence_transformers_has_the_checkpoints_own_parameters(run, tmp_path):
    words = ["export", "--ckpt", str(run), "--out"]
    assert main([*words, str(tmp_path / "st"), "--format", "sentence-transformers"]) == 0
    assert main([*words, str(tmp_path / "ours")]) == 0
    whole, kept, rounded = (read_saved(place).tensors for place in (run, tmp_path / "st", tmp_path / "ours"))
    assert all(torch.equal(whole[name], value) for name, value in kept.items()) and kept.keys() == rounded.keys()
    assert {value.dtype for value in rounded.values()} == {torch.bfloat16}


def parts(text):
    """The head of a card as a dictionary, and the texts of its sections."""
    _, head, rest = text.split("---\n", 2)
    first, *others = rest.split("\n## ")
    return yaml.safe_load(head), {"": first} | {part.partition("\n")[0]: part.partition("\n")[2] for part in others}


def test_a_run_tells_its_steps_data_figures_and_recipe(run, world, tmp_path, capsys):
    words = ["export", "--ckpt", str(run), "--license", "cc-by-4.0", "--out"]
    assert main([*words, str(tmp_path / "a")]) == 0
    head, told = parts((tmp_path / "a" / CARD).read_text("utf-8"))
    assert head["license"] == "cc-by-4.0" and head["library_name"] == "fromage"
    assert set(told) == {"", "How to use it", "Licence", "Training", "Figures", "Limits"}
    assert (
        "| steps | 2 |" in told["Training"]
        and "| examples | 16 |" in told["Training"]
        and "| lr | 0.005 |" in told["Training"]
    )
    data = yaml.safe_load("\n".join(line[4:] for line in told["Training"].splitlines() if line.startswith("    ")))
    assert data["init_args"]["train_shards"] == "cc3m/train" and data["init_args"]["max_tokens"] == 40
    report = read_saved(run).about
    value, step = report["figures"]["val/t2i_r5"]
    assert f"| t2i_r5 | {value:.4g} | 2 |" in told["Figures"] and step == 2
    assert "coloured shapes" in told["Limits"] and "cc-by-4.0" in told["Licence"]
    everything = "".join(path.read_text("utf-8") for path in (tmp_path / "a").iterdir() if path.suffix in (".md", ".json"))
    assert str(world) not in everything and "secret user" not in everything
    assert main(["export", "--ckpt", str(run), "--license", "our own, see below", "--out", str(tmp_path / "b")]) == 2
    assert "apache-2.0" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_what_is_known_travels_with_the_model(run, tmp_path):
    model = load_model(run)
    assert model.about["steps"] == 2
    model.save_pretrained(tmp_path / "a")
    again = Fromage.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b", license="mit")
    assert again.about == read_saved(run).about
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["about"] == {**again.about, "license": "mit"}
    head, told = parts((tmp_path / "b" / CARD).read_text("utf-8"))
    assert head["license"] == "mit" and "| steps | 2 |" in told["Training"]
    again.save_pretrained(tmp_path / "c", model_card_kwargs={"license": "mit"})  # as push_to_hub does
    assert read_folder(tmp_path / "c").about["license"] == "mit"
    assert "license" not in parts((tmp_path / "a" / CARD).read_text("utf-8"))[0]


def test_nothing_known_is_said_to_be_unknown(toy_model, tmp_path):
    toy_model.save_pretrained(tmp_path)
    head, told = parts((tmp_path / CARD).read_text("utf-8"))
    assert "license" not in head and "about" not in json.loads((tmp_path / CONFIG).read_text())
    assert "Not stated" in told["Licence"] and "not recorded" in told["Training"] and "None is recorded" in told["Figures"]
    with pytest.raises(UserError, match="apache"):
        toy_model.save_pretrained(tmp_path / "b", license="x\nlicense: y")


def test_towers_of_others_have_licences_of_their_own():
    for card in (fromage_card, octopus_card):
        text = card(SIZES, 5)
        assert "`facebook/opt-125m` and `ViT-B-32` have licences of their own" in text and "coloured shapes" not in text


def test_paths_and_addresses_are_published_by_their_last_parts():
    config = """
data:
  class_path: fromage.CC3M
  init_args:
    train_shards:
      - /home/me/data/cc3m/{00000..00331}.tar
      - s3://key:secret@bucket/own/train?token=abc
      - "pipe:cat /home/me/x"
    val_shards: https://me:secret@host
    batch_size: 180
    decoding: draft
    nested: {a: {b: 'C:\\Users\\me\\own\\val'}}
"""
    data = about_data(config)["init_args"]
    assert data["train_shards"] == ["cc3m/{00000..00331}.tar", "own/train", "pipe: a command"]
    assert data["batch_size"] == 180 and data["decoding"] == "draft" and data["nested"] == {"a": {"b": "own/val"}}
    assert not [word for word in ("secret", "home", "Users", "token") if word in str(data)]
    for none in ("", "[]", "data: 3", "{", "data: null"):
        assert about_data(none) == {}


HOSTILE = {
    "license": "mit\ntags: [x]", "source": "a | b\n# Evil\n\x1b[2J" + "x" * 1000, "steps": "7", "examples": -1,
    "hours": math.inf, "recipe": {"lr": "`|\n# Evil", "evil": 1, "betas": [0.9, {"a": object()}]},
    "figures": {"val/loss": [math.nan, 1], "val/r1": [1, 2, 3], "val/t2i_r1\n# Evil": [1, 2], "val/t2i_r5": [0.5, 9]},
    "data": {"a\n# Evil": "\n# Evil", "b": [[[[[[[[[[1]]]]]]]]]], "c": object()}, "more": 1,
}  # fmt: skip


def test_a_strangers_folder_writes_no_lines_of_its_own():
    kept = checked(HOSTILE)
    assert set(kept) == {"source", "recipe", "figures", "data"} and kept["figures"] == {"val/t2i_r5": [0.5, 9]}
    assert json.loads(json.dumps(kept)) == kept and checked(kept) == kept
    text = fromage_card(SIZES | {"about": HOSTILE}, 5)
    assert "license" not in parts(text)[0] and len(text) < 5000
    assert not [line for line in text.splitlines() if line.strip().startswith("# ") and "FROMAGe on" not in line]
    for odd in ({}, {"figures": 3, "data": [], "recipe": None}, {"figures": {"val/x": "ab"}}, {"hours": True}):
        assert checked(odd) == {}


def test_checkpoints_of_other_programs_tell_what_they_have():
    assert about_run({"hyper_parameters": {"lr": 0.1}, "global_step": 3, "callbacks": {"RunReport": "x"}}) == {
        "steps": 3,
        "recipe": {"lr": 0.1},
    }
    older = {"curves": {"val/loss": [(2, 0.5)], "train/loss": [(1, 2.0)], "val/x": []}, "examples": 8, "seconds": 3600.0}
    assert about_run({"hyper_parameters": {}, "callbacks": {"RunReport": older}}) == {
        "examples": 8,
        "hours": 1.0,
        "figures": {"val/loss": [0.5, 2]},
    }
