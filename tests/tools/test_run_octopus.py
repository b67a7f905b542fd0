"""tools/run_octopus.py: it trains, judges, and does nothing twice."""

import importlib.util
import json
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from fromage.errors import UserError
from fromage.models.packed_layout import PackedLayout
from fromage.octopus import model as octopus_model
from fromage.octopus.model import Octopus
from fromage.training.configs import find_config

TOOLS = Path(__file__).resolve().parents[2] / "tools"
FOUR = PackedLayout([4], torch.device("cpu"))  # tokens


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("run_octopus", TOOLS / "run_octopus.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_table_of_runs_and_no_run_twice(tool, world, tmp_path, monkeypatch, capsys):
    for name in ("world", "test_world"):
        (tmp_path / name).symlink_to(world)
    monkeypatch.setattr(tool.octopus_tour, "make", lambda out: None)
    monkeypatch.setattr(tool, "make_world", lambda *args, **options: None)
    few = [
        "--trainer.max_steps=2",
        "--trainer.limit_val_batches=0",
        "--data.batch_size=4",
        "--trainer.enable_progress_bar=false",
    ]
    words = ["run_octopus", "--out", str(tmp_path), "--only", "sequential", "no_relay", "--seeds", "1", "--limit", "4",
             "--threads", "1", "--json", str(tmp_path / "a.json"), "--", *few]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    tool.main()
    told = capsys.readouterr().out
    written = json.loads((tmp_path / "a.json").read_text())
    figures = written["figures"]
    assert written["setting"] == {"judged": "test", "limit": 4} and written["runs"]["no_relay"]["1"]["commit"]
    assert "== sequential, seed 1" in told and "| no_relay |" in told
    assert figures["no_relay"]["refcoco.val.head_recall_top1"]["mean"] >= 0
    assert "refcoco.val.head_recall_top1" not in figures["sequential"]
    assert any(name.endswith("objects.described") for name in figures["no_relay"])
    kept = [path for path in tmp_path.rglob("last.ckpt") if "stage1" in path.parts]
    assert len(kept) == 1, "stage 1 is one for all rows"
    run = written["runs"]["no_relay"]["1"]
    assert run["setting"]["words"] == ["--model.relay=false"] and run["checkpoint"] and run["trained"]
    monkeypatch.setattr(tool.octopus_tour, "train", None)
    monkeypatch.setattr(tool, "judge", None)
    tool.main()
    assert json.loads((tmp_path / "a.json").read_text()) == written
    monkeypatch.setitem(tool.ROWS, "no_relay", ["--model.num_queries=4"])
    with pytest.raises(UserError, match="holds a training of"):
        tool.main()


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("far_queries", lambda model: torch.pdist(model.queries).min() > 0.5 * model.queries.norm(dim=1).mean()),
        ("random_queries", lambda model: (model.queries.mean(0) / model.queries.norm(dim=1).mean()).norm() < 0.9),
        ("blind_queries", lambda model: octopus_model.among(FOUR.distances, torch.arange(4).view(1, 4), FOUR)[0, 0, 3] < 0),
        ("no_points", lambda model: not model.recognizer.points.any()),
    ],
)
def test_what_is_ours_can_be_undone(tool, name, holds):
    sizes = {"num_queries": 4, "decoder_width": 16, "decoder_layers": 1, "heads": 2}
    assert not holds(Octopus.load(**sizes))
    assert f".{tool.TRIED[name][1]}: " in tool.words_of(name)[0]
    with patch.object(*tool.TRIED[name]):
        assert holds(Octopus.load(**sizes))


def test_the_configurations_ask_for_captions_with_boxes_as_the_judge_does(tool):
    for name in tool.octopus_tour.STAGES[1:]:
        assert f"instruction: {tool.octopus_tour.SPOTTING}\n" in Path(find_config(name)).read_text()
