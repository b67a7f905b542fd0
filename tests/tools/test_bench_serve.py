"""The server's bench runs, against a server of its own, and writes its figures."""

import json
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def test_the_bench_runs_and_writes_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(TOOLS)
    import bench_serve

    monkeypatch.setattr(bench_serve, "TOKENS", 4)
    out = tmp_path / "bench.json"
    bench_serve.main(["--clients", "3", "--requests", "8", "--rounds", "1", "--json", str(out)])
    report = json.loads(out.read_text())
    assert report["clients"] == 3 and report["speedup_search"] > 0 and report["speedup_chat"] > 0
    for path in ("search", "chat"):
        assert report["requests_per_second"][path].keys() == {"one", "many"}
        for side in ("one", "many"):
            assert 0 < report["p50"][path][side] <= report["p99"][path][side]
    assert report["beside"].keys() == {"alone", "search", "chat"}
    assert all(0 < each["p50"] <= each["p99"] for each in report["beside"].values())
    assert report["search"].keys() == {"over HTTP", "embed and search", "FAISS"}
    assert 0 < report["search"]["FAISS"]["p50"] < report["search"]["embed and search"]["p50"]
    assert report["continuous_batching_estimate"] > 0 and set(report["steps_ms"]) == {"one", "all", "token"}
    assert "/search" in capsys.readouterr().out


def test_a_request_that_fails_ends_the_bench(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import bench_serve

    monkeypatch.setattr(bench_serve, "client", lambda port, path, numbers, seconds: seconds.extend(numbers[1:]))
    with pytest.raises(SystemExit, match="2 of 6"):
        bench_serve.load(1, "search", 2, 6)


def test_what_joining_gains_is_the_time_of_rows_that_have_ended(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import bench_serve

    steps = {"one": 0.0, "all": 0.0, "token": 1.0}
    assert bench_serve.gain_of_joining(steps, 1, 9) == pytest.approx(1)
    assert bench_serve.gain_of_joining(steps, 10_000, 9) == pytest.approx(9 / 5)
    assert bench_serve.gain_of_joining({**steps, "one": 1.0, "all": 1.0}, 10_000, 9) < 0.01
