"""The paper's ablations: each configuration changes one thing, and the tool trains and judges them all."""

import inspect
import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from fromage.config import FromageConfig
from fromage.errors import UserError
from fromage.training.configs import find_config
from fromage.training.module import FromageModule

TOOLS = Path(__file__).resolve().parents[2] / "tools"
CHANGES = {
    "always_paired": {"pairing": 1.0},
    "k2": {"k": 2},
    "k4": {"k": 4},
    "never_paired": {"pairing": 0.0},
    "no_captioning": {"captioning_weight": 0.0},
    "no_rescaling": {"rescale_ret": False},
    "no_ret": {"pooling": "last"},
    "no_retrieval": {"retrieval_weight": 0.0},
    "q64": {"q": 64},
}
BOTH = {"composition_captioning_weight": 1.0, "composition_retrieval_weight": 1.0}
FIVE = BOTH | {"r": 5, "ret_fusion": "transformer"}
COMPOSITIONS = {
    "both": BOTH,
    "captioning": {"composition_captioning_weight": 1.0},
    "clip": BOTH | {"space": "clip", "q": 128},
    "half": dict.fromkeys(BOTH, 0.5),
    "r5_sequential": FIVE | {"ret_attention": "sequential"},
    "r5_stacked": FIVE | {"ret_attention": "stacked"},
    "retrieval": {"composition_retrieval_weight": 1.0},
}


@pytest.fixture
def tool(monkeypatch):
    """tools/run_ablations.py."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import run_ablations

    return run_ablations


def saved(out):
    """A checkpoint in a run's folder."""
    checkpoint = out / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"")
    return checkpoint


def prepare(out):
    """A world of which the version alone is looked at."""
    (out / "world.json").write_text('{"version": 1}')
    return out, out


def test_each_configuration_changes_one_thing_of_the_toy_one(tool):
    def read(name):
        return yaml.safe_load(Path(find_config(name)).read_text())

    known = {f.name: f.default for f in fields(FromageConfig)}
    known |= {name: p.default for name, p in inspect.signature(FromageModule).parameters.items()}
    base = known | read("toy.yaml")["model"]["init_args"]
    assert tool.names() == ["base", *CHANGES]
    for name, change in CHANGES.items():
        assert change.keys() <= known.keys() and change.items().isdisjoint(base.items())
        assert read(f"ablations/{name}.yaml") == {"model": {"class_path": "fromage.FromageModule", "init_args": change}}


def test_every_seed_is_trained_and_judged_once_and_a_killed_run_taken_up(tool, tmp_path, monkeypatch, capsys):
    trained = []

    def train(out, k, world, features, words):
        trained.append((out.relative_to(tmp_path).as_posix(), *words))
        if len(trained) == 3:
            raise UserError("killed")
        return saved(out)

    seed = lambda model: float(model.parents[1].name[-1])  # noqa: E731
    monkeypatch.setattr(tool, "prepare", prepare)
    monkeypatch.setattr(tool, "train", train)
    monkeypatch.setattr(tool, "load_model", lambda path: path)
    monkeypatch.setattr(tool, "judge", lambda model, world, answers: {"fromage.5_captions.r1": 50 + seed(model)})
    out = tmp_path / "all.json"
    words = ["x", "--out", str(tmp_path), "--only", "base", "k4", "--json", str(out), "--", "--trainer.max_steps=1"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match="killed"):
        tool.main()
    tool.main()
    options = [
        (f"{name}/seed{n}", *over, f"--seed_everything={n}", f"--model.seed={n}", "--trainer.max_steps=1")
        for n in range(3)
        for name, over in (("base", ()), ("k4", ("--config", "ablations/k4.yaml")))
    ]
    assert trained == [*options[:3], *options[2:]]  # the third began again, the first two did not
    assert json.loads(out.read_text())["figures"]["k4"]["fromage.5_captions.r1"] == {"mean": 51.0, "deviation": 1.0}
    assert "| base |  |  |  | 51.0 ± 1.0 |" in capsys.readouterr().out
    (tmp_path / "base" / "seed0" / "figures.json").unlink()  # as after a kill between training and judging
    out.unlink()
    tool.main()
    assert len(trained) == len(options) + 1, "a run that came to its end was trained again"


def test_the_configurations_of_composition_learning(tool, tmp_path, monkeypatch):
    assert tool.compositions() == ["base", *(f"composition_{name}" for name in COMPOSITIONS)]
    for name, change in COMPOSITIONS.items():
        FromageModule(**change)
        read = yaml.safe_load(Path(find_config(f"ablations/composition_{name}.yaml")).read_text())
        assert read["model"] == {"class_path": "fromage.FromageModule", "init_args": change}
        assert read.get("data", {}).get("init_args", {}) == ({"target_images": False} if name == "clip" else {})
    trained = []
    monkeypatch.setattr(tool, "prepare", prepare)
    monkeypatch.setattr(tool, "train", lambda out, k, world, features, words: trained.append(words[:4]) or saved(out))
    monkeypatch.setattr(tool, "load_model", lambda path: path)
    monkeypatch.setattr(tool, "judge", lambda model, world, answers: {"fromage.composed.r1": 50.0})
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), "--only", "composition", "--seeds", "0"])
    tool.main()
    tuples = f"--data.train_tuples={tmp_path}/tuples/features"
    assert trained[0] == ["--seed_everything=0", "--model.seed=0"]
    few = "--data.tuple_shuffle=256"
    assert trained[1:] == [["--config", f"ablations/composition_{name}.yaml", tuples, few] for name in COMPOSITIONS]


def test_composed_retrieval_leaves_out_the_reference_of_a_query(tool, toy_model, tmp_path, monkeypatch):
    from fromage.evals.base import Retriever
    from fromage.toy.tuples import make_tuples

    make_tuples(tmp_path / "t", 6, "val", 2, progress=False)
    rows = torch.eye(toy_model.q)[:9]  # three references, then six targets
    monkeypatch.setattr(toy_model, "embed_images", lambda features: rows)
    want = 3 * rows[[0, 0, 1, 1, 2, 2]] + 2 * rows[3:]  # nearest to the own reference, then to the target
    embed = Retriever.embed_text

    def asked(system, texts, what):
        return want[[0, 1, 2, 3, 5, 4]] if system.name == "fromage" else embed(system, texts, what)

    monkeypatch.setattr(Retriever, "embed_text", asked)
    report = tool.find_composed(toy_model, tmp_path / "t")
    assert report["fromage"]["composed"]["r1"] == pytest.approx(100 * 4 / 6)
    assert report["chance"]["composed"]["r1"] == pytest.approx(100 / 8)
    assert {"clip", "clip_image", "clip_text"} < report.keys()
