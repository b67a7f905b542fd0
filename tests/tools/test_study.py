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


def test_figures_of_another_checkpoint_are_refused(study, tmp_path):
    file, fail = tmp_path / "a.json", lambda: pytest.fail("measured twice")
    first = study.measured(file, lambda: {"x": 1.0}, "c1", limit=2)
    assert first["checkpoint"] == "c1" and study.measured(file, fail, "c1", limit=2) == first
    with pytest.raises(UserError, match=r"holds figures of .*c1.*, this is of .*c2"):
        study.measured(file, fail, "c2", limit=2)


@pytest.mark.parametrize("older", [{}, {"setting": {"limit": 2}}])
def test_figures_that_do_not_say_what_they_are_of_are_made_again(study, tmp_path, capsys, older):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"commit": "old", "figures": {"x": 1.0}, **older}))
    assert study.measured(file, lambda: {"x": 2.0}, "c1", limit=2)["figures"] == {"x": 2.0}
    assert "made again" in capsys.readouterr().out and json.loads(file.read_text())["checkpoint"] == "c1"


def alike(x, **setting):
    """A run with one figure."""
    return {"commit": f"c{x}", "setting": setting, "figures": {"x": x}}


def test_runs_of_later_calls_stand_beside_those_of_earlier_ones(study, tmp_path):
    file = tmp_path / "all.json"
    study.collect(file, {"base": {"1": alike(1.0)}, "k4": {"0": alike(5.0)}}, judged="test")
    runs = study.collect(file, {"base": {"0": alike(3.0)}}, judged="test", train="more is known of later runs")
    assert list(runs["base"]) == ["0", "1"] and runs["k4"]["0"]["commit"] == "c5.0"
    written = json.loads(file.read_text())
    assert written["runs"] == runs and written["setting"] == {"judged": "test"}
    assert written["figures"]["base"]["x"] == {"mean": 2.0, "deviation": pytest.approx(2**0.5)}
    assert study.table({"x": "X", "y": "Y"}, runs).splitlines()[2:] == [
        "| base | 2.0 ± 1.4 |  | 0, 1 |",
        "| k4 | 5.0 |  | 0 |",
        "",
        "base: commits c1.0, c3.0",
    ]
    with pytest.raises(UserError, match="holds runs of"):
        study.collect(file, {"base": {"2": alike(3.0)}}, judged="val")
    assert json.loads(file.read_text()) == written


def test_runs_of_other_or_unknown_settings_have_no_mean_together(study, tmp_path):
    file, unknown = tmp_path / "a.json", {"figures": {"x": 1.0}}
    study.collect(file, {"base": {"0": alike(2.0, options=[]), "1": alike(4.0, options=[])}, "old": {"0": unknown}})
    study.collect(file, {"base": {"2": alike(9.0, options=["--model.k=2"])}})
    runs = study.collect(file, {"old": {"1": unknown}})
    figures = {row: found["x"]["mean"] for row, found in json.loads(file.read_text())["figures"].items()}
    assert figures == {"base (0, 1)": 3.0, "base (2)": 9.0, "old (0)": 1.0, "old (1)": 1.0}
    assert [line.partition(" |")[0] for line in study.table({"x": "X"}, runs).splitlines()[2:6]] == [
        f"| {row}" for row in figures
    ]
    runs = study.collect(file, {"base": {"2": alike(6.0, options=[])}})
    figures = json.loads(file.read_text())["figures"]
    assert figures.keys() == {"base", "old (0)", "old (1)"} and figures["base"]["x"]["mean"] == 4.0


def test_figures_of_rows_that_are_not_added_to_stay_as_they_are(study, tmp_path):
    file, unknown = tmp_path / "a.json", {"figures": {"x": 1.0}}
    of_old = {"x": {"mean": 1.0, "deviation": 0.0}}
    there = {"setting": {}, "runs": {"old": {"0": unknown, "1": unknown}}, "figures": {"old": of_old}}
    file.write_text(json.dumps(there))
    study.collect(file, {"base": {"0": alike(2.0)}})
    assert json.loads(file.read_text())["figures"]["old"] == of_old


@pytest.fixture
def folder(tmp_path):
    """A run's folder with a checkpoint."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").write_bytes(b"one")
    return tmp_path


def fit(study, folder, ended=False, **setting):
    """What is known of a training that leaves the folder's checkpoint."""
    checkpoint = folder / "run" / "last.ckpt"
    return study.trained(folder, lambda: checkpoint, ended, [folder / "figures.json"], **setting)[1]


def test_a_run_names_its_checkpoint_and_the_commits_of_its_training(study, folder, monkeypatch):
    record = folder / study.RECORD
    assert fit(study, folder, ended=True).keys() == {"checkpoint"} and not record.exists()
    record.write_text('["a"]')  # as an earlier version wrote it, in the middle of a training
    for commit, ended, named in (("a", False, ["a"]), ("b", False, ["a", "b"]), ("c", True, ["a", "b"])):
        monkeypatch.setattr(study, "commit", lambda now=commit: now)
        known = fit(study, folder, ended, words=("x",))
        assert known["trained"] == named and len(known["checkpoint"]) == 16
    with pytest.raises(UserError, match="holds a training of"):
        fit(study, folder, ended=True, words=("y",))
    (folder / "run" / "last.ckpt").write_bytes(b"two")
    assert fit(study, folder, ended=True, words=("x",))["checkpoint"] != known["checkpoint"]


def test_a_run_that_begins_anew_has_none_of_the_commits_of_the_former_one(study, folder, monkeypatch):
    fit(study, folder, words=("x",))
    checkpoint = folder / "run" / "last.ckpt"
    checkpoint.unlink()
    monkeypatch.setattr(study, "commit", lambda: "new")
    _, known = study.trained(folder, lambda: checkpoint.write_bytes(b"new") and checkpoint, False, [], words=("y",))
    assert known["trained"] == ["new"]


def test_figures_whose_checkpoint_is_gone_are_refused_before_the_training(study, folder):
    (folder / "figures.json").write_text("{}")
    fit(study, folder, ended=True)
    with pytest.raises(UserError, match="checkpoint of these figures is gone"):
        study.trained(folder, lambda: pytest.fail("trained"), False, [folder / "figures.json"])
    assert not (folder / study.RECORD).exists()


def test_a_figure_that_some_seeds_lack_is_the_mean_of_the_others_and_says_so(study):
    seeds = {"0": alike(1.0), "1": {"setting": {}, "figures": {"x": 3.0, "y": 5.0}}}
    assert study.spread(seeds)["y"] == {"mean": 5.0, "deviation": 0.0}
    assert study.table({"x": "X", "y": "Y"}, {"row": seeds}).splitlines()[2] == "| row | 2.0 ± 1.4 | 5.0 (1 of 2) | 0, 1 |"


def test_figures_of_the_repository_are_means_of_the_runs_beside_them(study):
    for path in (TOOLS.parent / "docs" / "results").glob("*.json"):
        held = json.loads(path.read_text())
        for row, seeds in held["runs"].items():
            groups = {row: seeds} if row in held["figures"] else study.alike(row, seeds)
            assert all(held["figures"].pop(name) == study.spread(some) for name, some in groups.items()), path.name
            assert all(run["commit"] and run["machine"] for run in seeds.values())
        assert not held["figures"]
