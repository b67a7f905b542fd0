"""tools/study.py: runs of several calls stand in one file."""

import json
from pathlib import Path

import pytest
import torch

from fromage.errors import UserError

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import study

    return study


def test_what_was_measured_is_not_measured_again(study, tmp_path):
    first = study.measured(tmp_path / "a.json", lambda: {"x": 1.0})
    assert first["figures"] == {"x": 1.0} and first["commit"]
    assert study.measured(tmp_path / "a.json", lambda: pytest.fail("measured twice")) == first
    assert first["machine"].endswith(f"{torch.get_num_threads()} threads")


def test_figures_of_another_setting_are_refused(study, tmp_path):
    first = study.measured(tmp_path / "a.json", lambda: {"x": 1.0}, limit=200)
    assert study.measured(tmp_path / "a.json", dict, limit=200) == first and first["setting"] == {"limit": 200}
    with pytest.raises(UserError, match="limit"):
        study.measured(tmp_path / "a.json", dict, limit=2000)


def test_runs_of_later_calls_stand_beside_those_of_earlier_ones(study, tmp_path):
    run = lambda x: {"commit": f"c{x}", "figures": {"x": x}}  # noqa: E731
    file = tmp_path / "all.json"
    study.collect(file, {"base": {"1": run(1.0)}, "k4": {"0": run(5.0)}}, judged="test")
    runs = study.collect(file, {"base": {"0": run(3.0)}}, judged="test")
    assert list(runs["base"]) == ["0", "1"] and runs["k4"]["0"]["commit"] == "c5.0"
    written = json.loads(file.read_text())
    assert written["runs"] == runs
    assert written["figures"]["base"]["x"] == {"mean": 2.0, "deviation": pytest.approx(2**0.5)}
    assert study.table({"x": "X", "y": "Y"}, runs).splitlines()[2:] == [
        "| base | 2.0 ± 1.4 |  | 0, 1 |",
        "| k4 | 5.0 |  | 0 |",
    ]
    with pytest.raises(UserError, match="holds runs of"):
        study.collect(file, {"base": {"2": run(3.0)}}, judged="val")
    assert json.loads(file.read_text()) == written


def test_runs_of_other_options_do_not_stand_in_one_row(study, tmp_path):
    runs = [{"commit": "c", "setting": {"options": some}, "figures": {"x": 1.0}} for some in ([], [], ["--model.k=2"])]
    study.collect(tmp_path / "a.json", {"base": {"0": runs[0]}})
    study.collect(tmp_path / "a.json", {"base": {"1": runs[1]}, "k2": {"0": runs[2]}})
    with pytest.raises(UserError, match=r"row base would hold runs with other options"):
        study.collect(tmp_path / "a.json", {"base": {"2": runs[2]}})


def test_a_run_names_the_commits_of_its_training(study, tmp_path, monkeypatch):
    assert study.trained_at(tmp_path, ended=True) == {}
    for commit, ended, named in (
        ("a", False, ["a"]),
        ("a", False, ["a"]),
        ("b", False, ["a", "b"]),
        ("c", True, ["a", "b"]),
    ):
        monkeypatch.setattr(study, "commit", lambda now=commit: now)
        assert study.trained_at(tmp_path, ended) == {"trained": named}


def test_a_figure_that_some_seeds_lack_is_the_mean_of_the_others_and_says_so(study):
    seeds = {"0": {"figures": {"x": 1.0}}, "1": {"figures": {"x": 3.0, "y": 5.0}}}
    assert study.spread(seeds)["y"] == {"mean": 5.0, "deviation": 0.0}
    assert study.table({"x": "X", "y": "Y"}, {"row": seeds}).splitlines()[2] == "| row | 2.0 ± 1.4 | 5.0 (1 of 2) | 0, 1 |"


def test_figures_of_the_repository_are_means_of_the_runs_beside_them(study):
    for path in (TOOLS.parent / "docs" / "results").glob("*.json"):
        held = json.loads(path.read_text())
        assert held["figures"] == {row: study.spread(seeds) for row, seeds in held["runs"].items()}, path.name
        assert all(run["commit"] and run["machine"] for seeds in held["runs"].values() for run in seeds.values())
