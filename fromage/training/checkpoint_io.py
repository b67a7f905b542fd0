"""Checkpoints that survive: written whole or not at all, looked through before they are used, and never the only one.

torch.save keeps a CRC-32 of every tensor, so a torn file or a flipped bit is found when the file is read.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException

from fromage.checkpoints.format import GENERATION
from fromage.checkpoints.run_folder import BEFORE, LAST, others_checkpoints
from fromage.checkpoints.safe_pickle import read_pickle
from fromage.errors import UserError
from fromage.io import WholeFile, disk_error, sync
from fromage.locks import held

TERMINATED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT  # exit codes of what these end


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes beside and renames, and keeps the last.ckpt that another replaces; paths with a :// are Lightning's to handle.

    Lightning writes into the system's temporary folder, and where that is another disk it copies over the old checkpoint.
    """

    def __init__(self) -> None:
        self.damaged: set[Path] = set()
        self.loaded: Path | None = None  # what a run goes on from
        self.steps: dict[Path, int | None] = {}  # the global step of each file that was written

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint. Raises UserError where the disk does not take it; what was there then still is."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path, buffer = Path(path), io.BytesIO()
        torch.save(checkpoint, buffer)
        there = "the one before it is untouched" if path.exists() else "there is none before it"
        with WholeFile(path, kept=f"{there}; go on with --ckpt_path last") as part:
            part.write_bytes(buffer.getbuffer())
            sync(part)  # before another file gives up its name
            self._keep(path)
        self.damaged.discard(path)
        self.steps[path] = checkpoint.get("global_step")

    def _keep(self, path: Path) -> None:
        """Give the last checkpoint, if it is sound, the name of the one before it."""
        if path.name != LAST or not path.exists() or path in self.damaged:
            return
        try:
            with WholeFile(path.with_name(BEFORE)) as link:
                link.unlink(missing_ok=True)
                os.link(path, link)
        # a file system without links: for a moment there is no last one, but there is the one before
        except (OSError, UserError):
            path.replace(path.with_name(BEFORE))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, on the CPU; in place of a damaged last.ckpt, with a warning, the one before it.

        Raises:
            UserError: the checkpoint is damaged, and so is the one before it, or there is none.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        self.loaded = path = Path(path)
        before = path.with_name(BEFORE)
        try:
            return read_pickle(path)
        except UserError as error:
            if path.name != LAST or not before.is_file():
                raise
            warnings.warn(f"{error}; going on from the one before it, {before}", stacklevel=2)
            found = read_pickle(before)
            self.damaged.add(path)
            return found


class SafeCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that saves by SafeCheckpointIO, at the end of training too, and when SIGTERM or Ctrl-C ends it.

    SIGTERM and the first Ctrl-C let the current step finish and be saved (exit codes 143 and 130); a second Ctrl-C ends at
    once. In the middle of a step of several batches (accumulate_grad_batches), or of a validation,
    nothing is saved: resuming goes on from the checkpoint before. Where a validation ends in the middle of a step, its
    checkpoint is of that step's end, one update later than its figures; validate every so many whole steps to avoid that.

    Where a run ends with a validation, its last checkpoint is written again after it, so that it holds the figures.

    While a run lasts it holds its folder. One with the checkpoints of another run is refused, unless `overwrite` is true.
    """

    def __init__(self, dirpath: str | Path | None = None, *, overwrite: bool = False, **options: Any) -> None:
        """Set where and when to save.

        Args:
            dirpath: folder of the checkpoints; null for `checkpoints` in the folder that the logger gives each run.
            overwrite: remove checkpoints of another run that are there.
            options: of Lightning's ModelCheckpoint; save_last null is true here.
        """
        if options.get("save_last") is None:
            options["save_last"] = True
        super().__init__(dirpath, **options)
        self.overwrite, self.interrupted = overwrite, False
        self._hold, self._holds = ExitStack(), False
        self._judged = -1  # the step of the last validation
        self._due = False  # whether a validation ended in the middle of the step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take over the reading and writing, unless the trainer was given a plugin for that; take hold of the folder."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO()
        if stage != "fit" or trainer.fast_dev_run or "://" in str(self.dirpath):  # type: ignore[attr-defined]
            return
        _on_first_device(trainer, lambda: self._hold.enter_context(held(str(self.dirpath))))
        self._holds = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that no other run's checkpoints are lost. From now on Ctrl-C waits for the end of a step, unless ignored."""
        super().on_train_start(trainer, pl_module)
        self._due = False
        store = trainer.strategy.checkpoint_io
        if self._holds and isinstance(store, SafeCheckpointIO):
            self._clear(trainer, store.loaded)
        handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if handled and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._interrupt)
            self._hold.callback(signal.signal, signal.SIGINT, signal.default_int_handler)

    def _clear(self, trainer: pl.Trainer, resumed: Path | None) -> None:
        """Remove the checkpoints of another run, or raise UserError on all devices; the first knows what was resumed."""

        def clear() -> None:
            for path in others_checkpoints(Path(str(self.dirpath)), resumed, self.overwrite):
                path.unlink()
                (path.parent / GENERATION).unlink(missing_ok=True)  # how to talk with the model that was there

        _on_first_device(trainer, clear)

    def _interrupt(self, *_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.interrupted = True
        print("stopping after this step; a second Ctrl-C stops at once", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)  # which Lightning heeds after a step, on all devices

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save on SIGTERM and Ctrl-C, and say by the exit code that the run is not at its end."""
        try:
            if not isinstance(exception, SIGTERMException):
                super().on_exception(trainer, pl_module, exception)
                return
            exception.code = INTERRUPTED if self.interrupted else TERMINATED
            if trainer.state.fn == "fit" and not (trainer.validating or trainer.sanity_checking or _mid_step(trainer)):
                self._save_now(trainer, pl_module)
        finally:
            self._hold.close()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save what is due, at the end of a step alone."""
        if _mid_step(trainer):
            return
        self._save_due(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what is due, or at the end of the step; note the step, of which there may be a checkpoint without figures."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._judged = trainer.global_step
        self._due = True
        if not _mid_step(trainer):
            self._save_due(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last steps, however many they are, with their validation."""
        self._save_due(trainer, pl_module)
        self._save_now(trainer, pl_module, again=self._judged == trainer.global_step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the folder to others."""
        super().teardown(trainer, pl_module, stage)
        self._hold.close()
        self._holds = False

    def _save_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the checkpoint of a validation, if one has ended since the last step did."""
        if self._due:
            self._due = False
            super().on_validation_end(trainer, pl_module)

    def _save_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule, again: bool = False) -> None:
        """Write the last checkpoint; unless it is of this step already, or again."""
        if trainer.fast_dev_run or not self.save_last:  # type: ignore[attr-defined]
            return
        super().on_train_end(trainer, pl_module)  # recent versions of Lightning write the first one, if there is none yet
        self.last_model_path = self.last_model_path or self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
        steps = getattr(trainer.strategy.checkpoint_io, "steps", {})  # known to the first device only
        if trainer.strategy.broadcast(again or steps.get(Path(self.last_model_path)) != trainer.global_step):
            trainer.save_checkpoint(self.last_model_path, self.save_weights_only)


def saved_checkpoint(trainer: pl.Trainer) -> str:
    """The last checkpoint that a run has written, or its best where it keeps no last one; '' before the first."""
    saver: Any = trainer.checkpoint_callback
    return (saver and (saver.last_model_path or saver.best_model_path)) or ""


def _mid_step(trainer: pl.Trainer) -> bool:
    """Whether a step of several batches has begun, and lacks some."""
    return bool((trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches) and not trainer.is_last_batch


def _on_first_device(trainer: pl.Trainer, act: Callable[[], object]) -> None:
    """Act on the first device alone; its UserError is raised on all, and its OSError as one, so that none waits for it."""
    said = None
    if trainer.is_global_zero:
        try:
            act()
        except (UserError, OSError) as error:
            said = str((isinstance(error, OSError) and disk_error(error)) or error)
    if said := trainer.strategy.broadcast(said):
        raise UserError(said)
