"""Folders of runs: each run its own, the newest gone on with; what another run left, or writes, stays untouched."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fromage.checkpoints.lightning import read_checkpoint
from fromage.checkpoints.load import read_saved
from fromage.checkpoints.run_folder import BEFORE, LAST, last_checkpoint
from fromage.cli.main import main
from fromage.errors import UserError
from fromage.retrieval.embed_images import absolute_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def quick(world):
    """Words of a run of two steps in runs/toy, without validation."""
    return [
        "fit",
        "--config=toy.yaml",
        f"--data.train_shards={world}/cc3m/train",
        "--data.val_shards=null",
        "--data.batch_size=8",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=null",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks.init_args.every_n_train_steps=1",
    ]


@pytest.fixture
def fit(quick, tmp_path, monkeypatch):
    """Runs `lightning fit` in a folder of its own: fit(words) returns the exit code."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: main([*quick, *words])


def step(path):
    return torch.load(path, weights_only=True)["global_step"]


def folder(number):
    return Path("runs", "toy", f"version_{number}", "checkpoints")


def test_each_run_has_its_folder_and_last_goes_on_in_that_of_the_newest(fit, capsys):
    assert fit() == 0
    first = folder(0) / LAST
    said = capsys.readouterr().out
    assert f"checkpoint: {first} (step 2)\nreport: {first.parents[1] / 'report.md'}\n" in said
    before = first.read_bytes()
    assert fit("--model.seed=1") == 0
    assert fit("--model.seed=1", "--ckpt_path=last", "--trainer.max_steps=3") == 0
    assert first.read_bytes() == before and step(folder(1) / LAST) == 3 and not folder(2).exists()
    assert "| steps | 3 of 3 |" in (folder(1).parent / "report.md").read_text()
    # a former checkpoint begins a run of its own
    assert fit(f"--ckpt_path={folder(1) / BEFORE}", "--trainer.max_steps=3") == 0
    assert step(folder(2) / LAST) == 3 and step(folder(1) / LAST) == 3
    # and that of a run, named by its folder, goes on there
    assert fit("--ckpt_path=runs/toy/version_0", "--trainer.max_steps=3") == 0
    assert step(first) == 3 and not folder(3).exists()


def test_last_is_no_error_before_the_first_run(fit):
    assert fit("--ckpt_path=last") == 0
    assert step(folder(0) / LAST) == 2


def test_checkpoints_of_another_run_are_replaced_only_where_that_is_said(fit, tmp_path, capsys):
    mine = f"--trainer.callbacks.init_args.dirpath={tmp_path}/mine"
    assert fit(mine) == 0
    (tmp_path / "mine" / "epoch=0.ckpt").touch()
    before = (tmp_path / "mine" / LAST).read_bytes()
    capsys.readouterr()
    assert fit(mine, "--model.seed=1") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is of another run" in line and "--ckpt_path last" in line and "--overwrite" in line
    assert (tmp_path / "mine" / LAST).read_bytes() == before and not Path("runs/toy/version_1").exists()
    assert fit(mine, "--ckpt_path=last", "--trainer.max_steps=3") == 0 and step(tmp_path / "mine" / LAST) == 3
    assert fit(mine, "--model.seed=1", "--overwrite", "--trainer.max_steps=1") == 0
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [LAST] and step(tmp_path / "mine" / LAST) == 1


@pytest.mark.parametrize("where", ["dirpath", "version", "last"])
def test_a_run_in_a_folder_that_another_process_writes_is_refused_and_leaves_no_trace(where, fit, other_writer, capsys):
    assert fit() == 0
    pid = other_writer(folder(0).absolute())
    words = {
        "dirpath": [f"--trainer.callbacks.init_args.dirpath={folder(0)}", "--overwrite"],
        "version": ["--trainer.logger.init_args.version=0", "--overwrite"],
        "last": ["--ckpt_path=last", "--trainer.max_steps=3"],
    }[where]
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file() and path.name != ".lock"}
    capsys.readouterr()
    assert fit(*words) == 2
    assert f"in use by process {pid}" in capsys.readouterr().err.strip().splitlines()[-1]
    assert {path: path.read_bytes() for path in before} == before and not Path("runs/toy/version_1").exists()


def test_the_last_checkpoint_of_a_folder_of_runs(tmp_path):
    assert last_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match="no such file in it"):
        read_checkpoint(tmp_path)
    for number, name in enumerate(
        ("version_1/checkpoints/last-1.ckpt", "checkpoints/last.ckpt", "version_0/checkpoints/last.ckpt")
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        torch.save({"hyper_parameters": {"n": number}, "state_dict": {}}, path)
        os.utime(path, ns=(number, number))
        assert last_checkpoint(tmp_path) == path and read_checkpoint(tmp_path)["hyper_parameters"] == {"n": number}
    assert read_saved(tmp_path).source == absolute_checkpoint(tmp_path) == str(path)
    assert last_checkpoint(tmp_path / "version_1") == tmp_path / "version_1" / "checkpoints" / "last-1.ckpt"
    path.rename(tmp_path / "version_0" / "last.ckpt")
    (tmp_path / "checkpoints" / LAST).unlink()
    with pytest.raises(UserError, match=r"the newest of this run is .*version_1/checkpoints/last-1\.ckpt"):
        read_checkpoint(tmp_path / "checkpoints" / LAST)


# --- what ends a run --------------------------------------------------------------------------------------------------


@pytest.fixture
def start(quick, tmp_path):
    """Starts a long run in a process of its own, for which Ctrl-C means what it does at a terminal."""
    runs = []

    def run(*words):
        def child():
            signal.signal(signal.SIGINT, signal.default_int_handler)  # also under a runner that ignores it

        command = [sys.executable, "-m", "fromage.cli.main", *quick, "--trainer.max_steps=100000", *words]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        runs.append(subprocess.Popen(command, cwd=tmp_path, env=env, preexec_fn=child, text=True,
                                     stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))  # fmt: skip
        return runs[-1]

    yield run
    for run in runs:
        run.kill()
        run.communicate()


def wait_for(path, run):
    while not path.exists() and run.poll() is None:
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_is_stopped_is_saved_and_says_where_and_how_to_go_on(number, code, start, fit, tmp_path):
    run, last = start("--trainer.callbacks.init_args.every_n_train_steps=3"), tmp_path / folder(0) / LAST
    wait_for(last, run)
    run.send_signal(number)
    said = run.communicate(timeout=100)[1]
    assert run.returncode == code and "Traceback" not in said
    saved = step(last)
    line = f"saved {folder(0) / LAST} (step {saved}); the same command goes on, lightning fit with --ckpt_path last"
    assert said.strip().splitlines()[-1].endswith(line)
    assert fit("--ckpt_path=last", f"--trainer.max_steps={saved + 1}") == 0 and step(last) == saved + 1


def test_ctrl_c_before_the_first_step_is_one_line(start, tmp_path):
    run = start("--trainer.callbacks.init_args.every_n_train_steps=100000")
    wait_for(tmp_path / folder(0).parent / "config.yaml", run)
    run.send_signal(signal.SIGINT)
    time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=100)[1]
    assert run.returncode == 130 and "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("fromage: stopped")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.accelerator=gpu"], "No supported gpu backend found"),
        (["--trainer.accelerator=nonsense"], "invalid accelerator name"),
        (["--trainer.devices=-3"], "should be an int > 0"),
        (["--data.batch_size=-4"], "data.batch_size is -4; it must be a whole number from 1 on"),
        (["--data.workers=-1"], "data.workers is -1"),
        (["--data.max_broken=2"], "data.max_broken is 2"),
    ],
)
def test_options_that_cannot_be_are_one_line(words, said, fit, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert fit(*words) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("fromage: ") and said in line


@pytest.mark.parametrize("limit", [1, 20_000])
def test_a_full_disk_is_one_line_that_names_a_path(limit, fit, disk, capsys):
    """Of a configuration or a logger's events, and of a checkpoint."""
    disk(limit)
    assert fit() == 2
    disk()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        line.startswith("fromage: runs/toy/version_0")
        and "cannot be written (File too large)" in line
        and "make room" in line
    )
    assert not list(Path("runs").rglob("*.part")) and not list(Path("runs").rglob(".*.part"))
