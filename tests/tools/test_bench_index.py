import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_index.py"


@pytest.fixture(autouse=True)
def as_script(monkeypatch):
    """Python puts a script's folder on its path."""
    monkeypatch.syspath_prepend(TOOL.parent)


def test_the_bench_runs_and_writes_its_figures(tmp_path, monkeypatch, capsys):
    out = tmp_path / "bench.json"
    words = ["--rows", "3000", "--rounds", "1", "--queries", "20", "--threads", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *words])
    runpy.run_path(str(TOOL), run_name="__main__")
    report = json.loads(out.read_text())
    assert report.keys() >= {"recall_at_10", "speedup_batch_1", "speedup_batch_256", "bytes_per_vector"}
    assert 0.8 < report["recall_at_10"] <= 1 and report["rows"] == 3000 and report["kind"] == "IVF256,SQ8"
    assert report["speedup_batch_1"] > 0 and 264 <= report["bytes_per_vector"] < 600
    assert "recall_at_10" in capsys.readouterr().out


def test_searches_within_a_filter_and_a_small_kind_are_measured(tmp_path, monkeypatch, capsys):
    out = tmp_path / "bench.json"
    words = [
        "--rows",
        "3000",
        "--rounds",
        "1",
        "--queries",
        "20",
        "--threads",
        "1",
        "--kind",
        "auto:small",
        "--json",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *words, "--where", "--float32"])
    runpy.run_path(str(TOOL), run_name="__main__")
    report = json.loads(out.read_text())
    assert "fs" in report["kind"] and report["oversample"] > 5 and report["bytes_per_vector"] < 64
    assert report["recall_at_10"] == pytest.approx(report["recall_at_10_float32"], abs=0.02) and report["recall_at_10"] > 0.9
    for share in ("1 %", "50 %"):
        measured = report[f"where_{share}"]
        assert measured["recall_at_10"] > 0.9 and measured["time_against_no_filter"].keys() == {"1", "256"}


def test_the_brute_force_is_not_compared_with_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--kind", "Flat"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(TOOL), run_name="__main__")
    assert "brute force itself" in capsys.readouterr().err


def test_the_mixture_has_clusters_and_repeats():
    tool = runpy.run_path(str(TOOL))
    rows = tool["Mixture"](500, 0).rows(2000)
    np.testing.assert_array_equal(rows, tool["Mixture"](500, 0).rows(2000))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    cosines = np.sort(rows @ rows.T, axis=1)
    assert np.median(cosines[:, -4]) > 0.6 and abs(np.median(cosines)) < 0.3  # neighbours, far from all others
