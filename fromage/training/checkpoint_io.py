"""Checkpoints that survive: written whole or not at all, looked through before they are used, and never the only one.

torch.save keeps a CRC-32 of every tensor, so a torn file or a flipped bit is found when the file is read.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException

from fromage.checkpoints.safe_pickle import read_pickle
from fromage.errors import UserError
from fromage.io import WholeFile

LAST, BEFORE = "last.ckpt", "last-1.ckpt"
TERMINATED = 128 + 15  # the exit code of what SIGTERM ends


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes beside and renames, and keeps the last.ckpt that another replaces; paths with a :// are Lightning's to handle.

    Lightning writes into the system's temporary folder, and where that is another disk it copies over the old checkpoint.
    """

    def __init__(self) -> None:
        self.damaged: set[Path] = set()
        self.steps: dict[Path, int | None] = {}  # the global step of each file that was written

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint. Raises UserError where the disk does not take it; what was there then still is."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path, buffer = Path(path), io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            with WholeFile(path) as part:
                with part.open("wb") as file:
                    file.write(buffer.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                self._keep(path)
            self.damaged.discard(path)
            self.steps[path] = checkpoint.get("global_step")
        except OSError as error:
            there = "the one before it is untouched" if path.exists() else "there is none before it"
            said = f"cannot be written ({error.strerror}), {there}; make room, then go on with --ckpt_path last"
            raise UserError(f"checkpoint {path}: {said}") from error

    def _keep(self, path: Path) -> None:
        """Give the last checkpoint, if it is sound, the name of the one before it."""
        if path.name != LAST or not path.exists() or path in self.damaged:
            return
        try:
            with WholeFile(path.with_name(BEFORE)) as link:
                link.unlink(missing_ok=True)
                os.link(path, link)
        except OSError:  # a file system without links: for a moment there is no last one, but there is the one before
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
        path = Path(path)
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
    """A ModelCheckpoint that saves by SafeCheckpointIO, at the end of training too, and when SIGTERM ends it.

    On SIGTERM the step under way is finished and saved, and the exit code is 143. In the middle of a step of several batches
    (accumulate_grad_batches), or of a validation, nothing is saved: resuming goes on from the checkpoint before.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take over the reading and writing, unless the trainer was given a plugin for that."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save on SIGTERM, and say by the exit code that the run is not at its end."""
        if not isinstance(exception, SIGTERMException):
            super().on_exception(trainer, pl_module, exception)
            return
        exception.code = TERMINATED
        mid_step = (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch
        if trainer.state.fn == "fit" and not (trainer.validating or trainer.sanity_checking or mid_step):
            self._save_now(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last steps, however many they are."""
        self._save_now(trainer, pl_module)

    def _save_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the last checkpoint, unless it is of this step already."""
        if trainer.fast_dev_run or not self.save_last:  # type: ignore[attr-defined]
            return
        super().on_train_end(trainer, pl_module)  # recent versions of Lightning write the first one, if there is none yet
        self.last_model_path = self.last_model_path or self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
        steps = getattr(trainer.strategy.checkpoint_io, "steps", {})  # known to the first device only
        if trainer.strategy.broadcast(steps.get(Path(self.last_model_path)) != trainer.global_step):
            trainer.save_checkpoint(self.last_model_path, self.save_weights_only)
