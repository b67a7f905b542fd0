"""What the Lightning modules share: updates that a guard watches, figures that are logged without waiting for a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from fromage.errors import UserError
from fromage.training.checkpoint_io import saved_checkpoint
from fromage.training.nonfinite import NonFiniteGuard


class GuardedModule(pl.LightningModule):
    """A Lightning module whose updates a guard watches, and which waits for a device's figures only where they are logged.

    Its training_step has the guard `see` the losses.
    """

    guard: NonFiniteGuard
    figures_due = True  # whether the figures of this step are logged

    def setup(self, stage: str) -> None:
        """Raise UserError where trainer.precision is set: frozen towers run in model.dtype, what is trained in float32."""
        if stage == "fit" and self.trainer.precision != "32-true":
            told = f"trainer.precision {self.trainer.precision}: the towers compute in model.dtype"
            raise UserError(f"{told}, trained parameters in float32; leave it out")

    def log_figures(self, figures: Mapping[str, Tensor | float], shown: Sequence[str] = (), **how: Any) -> None:
        """Log a step's figures; shown: those that the progress bar has too.

        Lightning reads what is shown in every step, and for that waits for the device. On other devices than a CPU figures
        are therefore on the host, and of the steps that the trainer logs alone: callbacks that monitor one see it change
        every log_every_n_steps steps.
        """
        if not self.figures_due:
            return
        for name, value in figures.items():
            on_host = torch.as_tensor(value, device="cpu").detach()
            self.log(name, on_host, prog_bar=name in shown, **how)

    def on_train_start(self) -> None:
        """A resumed run has the optimiser options that it is given; PyTorch restores those of the checkpoint."""
        if self.global_step:
            own: Any = self.configure_optimizers()
            for group, mine in zip(self.trainer.optimizers[0].param_groups, own["optimizer"].param_groups, strict=True):
                group |= {name: value for name, value in mine.items() if name not in ("params", "lr", "initial_lr")}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Decide whether the figures of this step are logged; tell of an update that was not finite.

        It is decided here, for all batches of a step, since global_step has advanced where the last of them ends.
        """
        due = logs_step(self.trainer, self.global_step + 1) or self.trainer.should_stop
        self.figures_due = self.device.type == "cpu" or due
        self.guard.check(self._last_good)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Skip the update if a loss or gradient is not finite."""
        self.guard.before_update(optimizer, self.global_step)

    def on_train_end(self) -> None:
        """Check the last losses too."""
        self.guard.check(self._last_good, wait=True)

    @property
    def _last_good(self) -> str:
        return saved_checkpoint(self.trainer) or "none yet"


def logs_step(trainer: Any, step: int) -> bool:
    """Whether a trainer logs a step, counted from 1: every log_every_n_steps steps, and none with 0."""
    return trainer.log_every_n_steps > 0 and step % trainer.log_every_n_steps == 0
