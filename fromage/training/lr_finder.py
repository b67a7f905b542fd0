"""The learning-rate finder: the range test of Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, 3.3."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, log10
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl

from fromage.errors import UserError
from fromage.images.line_chart import line_chart
from fromage.io import write_files

LOST = 4.0  # the test ends at this multiple of the lowest loss


class LRFinder(pl.Callback):
    """Multiplies the learning rate by a constant factor each step, and finds the rate at which the loss fell fastest.

    Prints this rate and draws the losses into lr_find.svg in the logger's folder. (Lightning 2.6's own finder has a biased
    running mean at the start, and compares slopes over the rate instead of its logarithm, which favours the lowest rates.)
    """

    def __init__(self, min_lr: float = 1e-6, max_lr: float = 1.0) -> None:
        """Set the range.

        Args:
            min_lr: Learning rate of the first step.
            max_lr: Learning rate of the last step, unless the loss reaches four times its minimum before.
        """
        if not 0 < min_lr < max_lr:
            raise UserError(f"learning-rate finder: min_lr {min_lr}, max_lr {max_lr}: choose 0 < min_lr < max_lr")
        self.min_lr, self.max_lr = min_lr, max_lr
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switch the run's own schedule off. Raises UserError without a number of steps, over which the rate rises."""
        if trainer.max_steps < 2:
            raise UserError("learning-rate finder: needs trainer.max_steps, of 2 or more: the rate rises over them")
        trainer.strategy.lr_scheduler_configs = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the step's learning rate."""
        rate = self.min_lr * (self.max_lr / self.min_lr) ** (trainer.global_step / max(1, trainer.max_steps - 1))
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = rate
        self.rates.append(rate)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the loss, averaged over devices; end the test if it has diverged."""
        loss = float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean"))
        self.losses.append(loss)
        if not isfinite(loss) or loss > LOST * min(self.losses):
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print and draw the result. Raises UserError if the loss never fell."""
        best = steepest([loss for loss in self.losses if isfinite(loss)], max(2, len(self.losses) // 20))
        if best is None:
            raise UserError("learning-rate finder: the loss never fell; raise trainer.max_steps, or try another range")
        rate, folder = self.rates[best], Path(trainer.log_dir or trainer.default_root_dir)
        curve = [(log10(lr), loss) for lr, loss in zip(self.rates, self.losses, strict=True)]
        lines = {"loss": curve, f"{rate:.2g}": [curve[best]]}
        if trainer.is_global_zero:
            chart = line_chart(lines, "loss by learning rate", x="log10 of the learning rate")
            write_files(folder, {"lr_find.svg": chart.encode()})
            print(f"learning rate: --model.lr {rate:.2g}, where the loss fell fastest; curve: {folder / 'lr_find.svg'}")


def steepest(losses: Sequence[float], width: int) -> int | None:
    """The step at which the loss fell most, by the means of `width` losses before and after; None if it never fell."""
    places = range(width, len(losses) - width + 1)
    falls = {i: fmean(losses[i - width : i]) - fmean(losses[i : i + width]) for i in places}
    best = max(falls, key=lambda i: falls[i], default=None)
    return best if best is not None and falls[best] > 0 else None
