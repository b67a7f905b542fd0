"""The progress bar of `fit` and its kin: tqdm's, with how far the whole run is."""

from __future__ import annotations

import sys
import time
from math import inf
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from tqdm import tqdm


class RunProgressBar(TQDMProgressBar):
    """A bar for each epoch; behind it the step and the time left of the whole run, estimated from the pace so far.

    Lightning would take rich's bar where that is installed: it writes nothing to a file, and what it tells a terminal to do
    does not pass PrintableStream. In a file the bar is written only in steps that are logged.
    """

    _began: tuple[float, int]  # seconds of a clock, and steps made, when this run began or went on

    def __init__(self, log_every_n_steps: int) -> None:
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else log_every_n_steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._began = time.monotonic(), trainer.global_step

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands behind the bar: step, time left, and the module's figures by the last parts of their names."""
        figures = dict(super().get_metrics(trainer, pl_module))
        figures.pop("v_num", None)
        step, steps = trainer.global_step, trainer.estimated_stepping_batches  # infinite for a run without an end
        whole: dict[str, Any] = {"step": f"{step}/{steps}" if steps < inf else step}
        began, first = self._began
        if steps < inf and step > first:
            left = (time.monotonic() - began) / (step - first) * max(0, steps - step)
            whole["left"] = tqdm.format_interval(left)
        return whole | {name.rpartition("/")[2]: value for name, value in figures.items()}
