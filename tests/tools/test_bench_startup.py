"""tools/bench_startup.py runs and writes its figures."""

import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_startup

    return bench_startup


def test_first_words_come_before_the_end(bench, tmp_path, monkeypatch, capsys):
    slow = "import time; print('first', flush=True); time.sleep(0.3)"
    monkeypatch.setattr(bench, "COMMANDS", {"a slow one": ["-c", slow]})
    monkeypatch.setattr(sys, "argv", ["bench", "--rounds", "1", "--json", str(tmp_path / "bench.json")])
    bench.main()
    seconds = json.loads((tmp_path / "bench.json").read_text())["seconds"]["a slow one"]
    assert 0 < seconds["first_words"] < seconds["end"] - 0.2
    assert "a slow one" in capsys.readouterr().out


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "print('x'); raise SystemExit(3)", "pass"])
def test_a_command_that_fails_is_no_figure(bench, code):
    with pytest.raises(SystemExit, match="ended with"):
        bench.timed(["-c", code])
