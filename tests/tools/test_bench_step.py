import json
import runpy
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_step.py"


def test_the_bench_runs_and_writes_its_figures(tmp_path, monkeypatch, capsys):
    out = tmp_path / "bench.json"
    monkeypatch.syspath_prepend(TOOL.parent)  # as where Python runs a script
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--preset", "tiny", "--rounds", "1", "--exact", "--json", str(out)])
    runpy.run_path(str(TOOL), run_name="__main__")
    report = json.loads(out.read_text())
    assert report.keys() >= {"speedup", "speedup_stored_features", "peak_memory_ratio", "examples_per_second"}
    assert report["max_rel_grad_error"] < 1e-4 and 0 < report["peak_memory_ratio"] < 1
    for errors in report["rel_grad_error_float32"].values():
        assert (
            errors["reference"].keys() == errors["fast"].keys() >= {"text_head.weight", "visual_prefix.weight", "ret.input"}
        )
        assert all(0 < max(some.values()) < 1e-3 for some in errors.values())
    assert (
        set(report["examples_per_second"]) == {"reference", "fast", "stored features"} and "ratio" in capsys.readouterr().out
    )
