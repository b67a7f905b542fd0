"""tools/bench_linear.py runs and writes its figures."""

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_linear.py"


def test_the_bench_runs_and_writes_its_figures(tmp_path):
    words = [sys.executable, str(TOOL), "--threads", "1", "--rounds", "1", "--json", str(tmp_path / "linear.json")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=True)
    found = json.loads((tmp_path / "linear.json").read_text())
    assert found["threads"] == 1 and len(found["layers"]) == done.stdout.count(" x ") // 2 - 1
    for layer in found["layers"]:
        assert layer["ratio"] == layer["plain_s"] / layer["ours_s"] > 0
