"""The bench of Octopus' training step runs, and compares like with like."""

import json
from pathlib import Path

import pytest
import torch

from fromage.octopus.step import octopus_step

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_octopus

    return bench_octopus


def test_the_bench_runs_and_writes_its_figures(bench, tmp_path, capsys):
    bench.main(["--preset", "tiny", "--rounds", "1", "--json", str(tmp_path / "figures.json")])
    said, figures = capsys.readouterr().out, json.loads((tmp_path / "figures.json").read_text())
    assert all(stage["seconds"] > 0 for stage in figures["stages"].values()) and len(figures["stages"]) == 3
    rows = figures["rows"]
    assert rows["examples"] == 8 and rows["ratio"] == pytest.approx(
        rows["seconds"]["alone"] / rows["seconds"]["together"], abs=0.01
    )
    assert rows["tokens"]["together"] < rows["tokens"]["alone"]
    assert "stage 3: " in said and "times as long" in said


def test_both_sides_have_the_same_loss(bench):
    torch.manual_seed(0)
    model = bench.build(bench.PRESETS["tiny"], 4, "cpu")
    together, alone = (octopus_step(model, bench.lesson(model, 8, True, per_image)).loss for per_image in (8, 1))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
