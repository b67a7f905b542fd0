"""Checkpoints under torn files, flipped bits, full disks, SIGKILL and SIGTERM."""

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from test_module import TOY

from fromage.cli.main import main
from fromage.data.datamodule import CC3M
from fromage.errors import UserError
from fromage.training.checkpoint_io import BEFORE, LAST, TERMINATED, SafeCheckpoint, SafeCheckpointIO, _on_first_device
from fromage.training.module import FromageModule


def checkpoint(step):
    return {"global_step": step, "state_dict": {"w": torch.arange(600.0) + step}, "hyper_parameters": {}}


@pytest.fixture
def two(tmp_path):
    """An io that wrote two checkpoints, and where the last one is."""
    store = SafeCheckpointIO()
    for step in (1, 2):
        store.save_checkpoint(checkpoint(step), tmp_path / LAST)
    return store, tmp_path / LAST


def same(a, b):
    return a["global_step"] == b["global_step"] and torch.equal(a["state_dict"]["w"], b["state_dict"]["w"])


def test_the_last_two_are_kept_and_nothing_else(two, tmp_path):
    store, last = two
    store.save_checkpoint(checkpoint(3), last)
    assert same(store.load_checkpoint(last), checkpoint(3))
    assert same(store.load_checkpoint(last.with_name(BEFORE)), checkpoint(2))
    store.save_checkpoint(checkpoint(4), tmp_path / "best.ckpt")
    store.save_checkpoint(checkpoint(5), tmp_path / "best.ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.ckpt", BEFORE, LAST]


def test_without_hard_links_the_last_two_are_kept_too(two, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    two[0].save_checkpoint(checkpoint(3), two[1])
    assert [torch.load(two[1].with_name(name))["global_step"] for name in (LAST, BEFORE)] == [3, 2]


@pytest.mark.parametrize("keep", [0, 1, 100, 1500, -1])
def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(two, keep):
    store, last = two
    last.write_bytes(last.read_bytes()[:keep])
    with pytest.warns(UserWarning, match=r"last\.ckpt: .*one before it, .*last-1\.ckpt"):
        assert same(store.load_checkpoint(last), checkpoint(1))
    store.save_checkpoint(checkpoint(3), last)  # the damaged one does not replace the good one before it
    assert same(store.load_checkpoint(last), checkpoint(3))
    assert same(store.load_checkpoint(last.with_name(BEFORE)), checkpoint(1))
    store.save_checkpoint(checkpoint(4), last)
    assert same(store.load_checkpoint(last.with_name(BEFORE)), checkpoint(3))


@pytest.mark.filterwarnings("ignore")
def test_a_flipped_bit_is_never_read_as_something_else(two):
    store, last = two
    data, rng, passed_over = last.read_bytes(), random.Random(0), 0
    for _ in range(400):
        where = rng.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[where // 8] ^= 1 << where % 8
        last.unlink()  # which is linked, perhaps
        last.write_bytes(flipped)
        found = store.load_checkpoint(last)
        passed_over += same(found, checkpoint(1))
        assert same(found, checkpoint(1)) or same(found, checkpoint(2)), where
    assert passed_over > 200  # the others were in padding


def test_two_damaged_checkpoints_are_refused_by_name(two):
    for name in (LAST, BEFORE):
        path = two[1].with_name(name)
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[:-9])
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"last-1\.ckpt: unreadable"):
        two[0].load_checkpoint(two[1])
    two[1].with_name(BEFORE).unlink()
    with pytest.raises(UserError, match=r"last\.ckpt: unreadable"):
        two[0].load_checkpoint(two[1])


def test_a_full_disk_leaves_the_last_checkpoint_untouched(two, tmp_path):
    before, limits = two[1].read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # no file may grow beyond
    try:
        with pytest.raises(UserError, match=r"last\.ckpt: cannot be written \(File too large\); the one before.*make room"):
            two[0].save_checkpoint(checkpoint(3), two[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert two[1].read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [BEFORE, LAST]


def save_on_and_on(path, tell):
    """Checkpoints, one after the other, and the step of each that is written."""
    torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork, and a child that asks for them waits for good
    store = SafeCheckpointIO()
    for step in range(1, 10_000):
        store.save_checkpoint(checkpoint(step) | {"more": torch.full((100_000,), step)}, path)
        tell.send(step)


def test_a_kill_while_a_checkpoint_is_written_costs_that_one_at_most(tmp_path):
    rng, last = random.Random(0), tmp_path / LAST
    for _ in range(10):
        told, tell = multiprocessing.Pipe(duplex=False)
        writer = multiprocessing.get_context("fork").Process(target=save_on_and_on, args=(last, tell), daemon=True)
        writer.start()
        tell.close()
        step = told.recv()
        time.sleep(0.03 * rng.random())
        writer.kill()
        writer.join()
        try:
            while True:
                step = told.recv()
        except EOFError:
            pass
        found = SafeCheckpointIO().load_checkpoint(last)  # without a warning: it is whole
        assert found["global_step"] in (step, step + 1) and (found["more"] == found["global_step"]).all()
        assert {p.name.strip(".") for p in tmp_path.iterdir()} <= {LAST, BEFORE, f"{LAST}.part", f"{BEFORE}.part"}


# --- runs -------------------------------------------------------------------------------------------------------------


STEPS = 26  # of 16 pairs, so an epoch of 18 steps and a bit


@pytest.fixture(scope="module")
def start(world):
    """How to start a run of the command line, in a process group of its own, saved at every third step."""
    runs = []

    def run(out, *more):
        words = [sys.executable, "-m", "fromage.cli.main", "fit", "--config=toy.yaml", "--trainer.enable_progress_bar=false",
                 f"--data.train_shards={world}/cc3m/train", f"--data.val_shards={world}/cc3m/val", "--data.batch_size=16",
                 "--data.workers=1", "--data.shuffle=100", f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=24",
                 "--trainer.logger=false", f"--trainer.callbacks.init_args.dirpath={out}", "--trainer.limit_val_batches=1",
                 "--trainer.callbacks.init_args.every_n_train_steps=3", *more,
                 "--trainer.callbacks+=key_log.KeyLog", f"--trainer.callbacks.path={out.parent}/keys"]  # fmt: skip
        paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        runs.append(subprocess.Popen(words, cwd=out.parent, env=env, start_new_session=True, text=True,
                                     stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))  # fmt: skip
        return runs[-1]

    yield run
    for run in runs:
        run.kill()
        run.communicate()


def written(folder):
    """When the last checkpoint was written; 0 where there is none."""
    return (folder / LAST).stat().st_mtime_ns if (folder / LAST).exists() else 0


def wait_for_checkpoints(run, folder, count):
    """Until so many were written, or the run is over."""
    seen = written(folder)
    while count and run.poll() is None:
        time.sleep(0.002)
        if written(folder) != seen:
            seen, count = written(folder), count - 1


def assert_same_run(folder, straight):
    """The same samples in every step, the repeated ones too, and the same weights at the end."""
    wanted = [json.loads(line) for line in (straight.parent / "keys").read_text().splitlines()]
    assert [step for step, _ in wanted] == list(range(1, STEPS + 1))
    rows = [json.loads(line) for line in (folder.parent / "keys").read_text().splitlines()]
    assert {step for step, _ in rows} == set(range(1, STEPS + 1)) and all(row in wanted for row in rows)
    found, wanted = (torch.load(path / LAST, weights_only=True) for path in (folder, straight))
    assert found["global_step"] == wanted["global_step"] == STEPS
    for name, value in wanted["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    """The checkpoints of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("straight") / "checkpoints"
    run = start(out)
    assert run.wait(300) == 0, run.stderr.read()
    return out


def test_a_run_killed_at_random_ends_with_the_same_weights(start, straight, tmp_path):
    rng, out, killed = random.Random(1), tmp_path / "checkpoints", 0
    for _ in range(2):
        run = start(out, "--ckpt_path=last")
        wait_for_checkpoints(run, out, rng.randrange(1, 4))
        time.sleep(0.1 * rng.random())
        run.kill()
        killed += run.wait() == -signal.SIGKILL
    assert killed == 2
    run = start(out, "--ckpt_path=last")
    assert run.wait(300) == 0, run.stderr.read()
    assert_same_run(out, straight)
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [BEFORE, LAST]


def test_sigterm_to_the_whole_job_saves_and_the_rest_is_exact(start, straight, tmp_path):
    out = tmp_path / "checkpoints"
    run = start(out)
    wait_for_checkpoints(run, out, 2)
    before = torch.load(out / LAST, weights_only=True)["global_step"]
    os.killpg(run.pid, signal.SIGTERM)  # the worker too
    assert run.wait(300) == TERMINATED, run.stderr.read()
    assert before < torch.load(out / LAST, weights_only=True)["global_step"] < STEPS
    damaged = bytearray((out / LAST).read_bytes())
    damaged[len(damaged) // 2] ^= 16
    (out / LAST).write_bytes(damaged)
    run = start(out, "--ckpt_path=last")
    assert run.wait(300) == 0, run.stderr.read()
    assert "going on from the one before it" in run.stderr.read()
    assert_same_run(out, straight)


def test_an_explicit_damaged_checkpoint_is_refused(tmp_path, capsys):
    torn = tmp_path / LAST
    torn.write_bytes(b"PK torn")
    SafeCheckpointIO().save_checkpoint(checkpoint(1), tmp_path / BEFORE)
    assert main(["fit", "--config=toy.yaml", f"--ckpt_path={torn}"]) == 2
    assert f"fromage: checkpoint {torn}: " in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_any_step_and_the_end_of_training_can_be_gone_on_from(world, tmp_path):
    """Also where training ends between two checkpoints, and at an epoch's end."""

    def fit(out, steps, resume=None):
        pl.seed_everything(0)
        saver = SafeCheckpoint(out, save_last=True, save_top_k=0, every_n_train_steps=1000, enable_version_counter=False)
        data = CC3M(str(world / "cc3m" / "train"), batch_size=16, max_tokens=40, workers=0, samples_per_epoch=48)  # 3 steps
        trainer = pl.Trainer(max_steps=steps, accelerator="cpu", logger=False, callbacks=[saver], enable_progress_bar=False,
                             enable_model_summary=False)  # fmt: skip
        module = FromageModule(**TOY)
        trainer.fit(module, data, ckpt_path=resume)
        return {name: value.clone() for name, value in module.model.trained().items()}

    whole = fit(tmp_path / "whole", 5)
    for steps in (2, 3, 4):
        fit(tmp_path / str(steps), steps)
        rest = fit(tmp_path / str(steps), 5, resume="last")
        assert all(torch.equal(rest[name], value) for name, value in whole.items()), steps


class Terminated(pl.Callback):
    """Ends training after a batch as SIGTERM does."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            raise SIGTERMException


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("batch", "saved"), [(0, None), (1, 1), (2, 1), (3, 2)])
def test_sigterm_saves_whole_steps_only(world, tmp_path, batch, saved):
    saver = SafeCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)
    data = CC3M(str(world / "cc3m" / "train"), batch_size=4, max_tokens=40, workers=0, samples_per_epoch=48)
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[Terminated(batch), saver], accumulate_grad_batches=2,
                         enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    with pytest.raises(SIGTERMException) as ended:
        trainer.fit(FromageModule(**TOY), data)
    assert ended.value.code == TERMINATED
    found = torch.load(tmp_path / LAST, weights_only=True)["global_step"] if (tmp_path / LAST).exists() else None
    assert found == saved


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_another_precision_is_refused_before_the_towers_are_loaded(world, precision):
    data = CC3M(str(world / "cc3m" / "train"), batch_size=4, max_tokens=40, workers=0, samples_per_epoch=48)
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, precision=precision, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    module = FromageModule(**TOY)
    with pytest.raises(UserError, match=rf"trainer.precision {precision}: the towers compute in model.dtype"):
        trainer.fit(module, data)
    assert not hasattr(module, "model")


class Saves(pl.Callback):
    """Notes the checkpoint before each batch: its step, and the batches that it counts as read."""

    def __init__(self, folder):
        self.folder, self.found = folder, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (path := self.folder / LAST).exists():
            stored = torch.load(path, weights_only=True)
            read = stored["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]
            self.found.append((stored["global_step"], read))


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_saved_in_the_middle_of_a_step(world, tmp_path):
    """Neither by the first batch after a resume, nor where a validation ends there: that is saved at the step's end."""

    def fit(folder, steps, resume=None, every=2, **validated):
        saver = SafeCheckpoint(folder, save_last=True, save_top_k=1, every_n_train_steps=every)
        data = CC3M(str(world / "cc3m" / "train"), str(world / "cc3m" / "val"), batch_size=4, max_tokens=40, workers=0,
                    samples_per_epoch=96)  # fmt: skip
        saves = Saves(folder)
        trainer = pl.Trainer(max_steps=steps, accelerator="cpu", logger=False, callbacks=[saver, saves],
                             accumulate_grad_batches=2, num_sanity_val_steps=0, enable_progress_bar=False,
                             enable_model_summary=False, **validated)  # fmt: skip
        trainer.fit(FromageModule(**TOY), data, ckpt_path=resume)
        return saves.found

    assert set(fit(tmp_path / "a", 4, limit_val_batches=0)) == {(2, 4)}
    assert set(fit(tmp_path / "a", 5, str(tmp_path / "a" / LAST), limit_val_batches=0)) == {(4, 8)}
    judged = fit(tmp_path / "b", 6, every=None, val_check_interval=3, limit_val_batches=1)
    assert (2, 4) in judged and all(read == 2 * step for step, read in judged)


class StopsThere(pl.Callback):
    """Ends training with the first validation, as early stopping may."""

    def on_validation_end(self, trainer, pl_module):
        trainer.should_stop = not trainer.sanity_checking


@pytest.mark.filterwarnings("ignore")
def test_a_validation_that_ends_a_run_in_the_middle_of_a_step_has_its_checkpoint(world, tmp_path):
    saver = SafeCheckpoint(tmp_path, save_last=True, save_top_k=1, monitor="val/t2i_r1", mode="max")
    data = CC3M(str(world / "cc3m" / "train"), str(world / "cc3m" / "val"), batch_size=4, max_tokens=40, workers=0,
                samples_per_epoch=96)  # fmt: skip
    trainer = pl.Trainer(max_steps=6, accelerator="cpu", logger=False, callbacks=[StopsThere(), saver], val_check_interval=3,
                         accumulate_grad_batches=2, num_sanity_val_steps=0, limit_val_batches=1, enable_progress_bar=False,
                         enable_model_summary=False)  # fmt: skip
    trainer.fit(FromageModule(**TOY), data)
    assert trainer.global_step == 1 and Path(saver.best_model_path).is_file()


@pytest.mark.filterwarnings("ignore")
def test_the_end_of_training_is_not_written_twice(world, tmp_path):
    """So the checkpoint before the last one stays an earlier one; and a trial run writes none."""
    for trial in (True, False):
        saver = SafeCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)
        data = CC3M(str(world / "cc3m" / "train"), batch_size=4, max_tokens=40, workers=0, samples_per_epoch=48)
        trainer = pl.Trainer(max_steps=2, accelerator="cpu", logger=False, callbacks=[saver], fast_dev_run=trial,
                             enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
        trainer.fit(FromageModule(**TOY), data)
        steps = {p.name: torch.load(p, weights_only=True)["global_step"] for p in tmp_path.glob("*.ckpt")}
        assert steps == ({} if trial else {LAST: 2, BEFORE: 1})


def test_an_error_of_the_first_device_is_told_on_all():
    told = []
    strategy = SimpleNamespace(broadcast=lambda said: told.append(said) or said)

    def refuse():
        raise PermissionError(errno.EACCES, "Permission denied", "/there/.lock")

    with pytest.raises(UserError, match="cannot be opened"):
        _on_first_device(SimpleNamespace(is_global_zero=True, strategy=strategy), refuse)
    assert "/there/.lock" in told[0]


def test_the_last_checkpoint_is_kept_unless_it_is_unwanted(tmp_path):
    assert SafeCheckpoint(tmp_path).save_last and SafeCheckpoint(tmp_path, save_last=None).save_last
    assert not SafeCheckpoint(tmp_path, save_last=False).save_last
