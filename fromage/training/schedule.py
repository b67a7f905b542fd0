"""The learning rate of a run: linear warm-up, then constant or a cosine decay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import cos, pi
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def factor(step: int, warmup: int = 0, first: int = 1, decay: int = 0) -> float:
    """The factor of the learning rate in step n = 0, 1 ...: (n + first) / warmup, at most 1, for `warmup` steps.

    After them it is 1, or falls along a cosine to 0 in `decay` steps and stays there; decay 0: no decay.
    """
    if step < warmup or not decay:
        return min(1.0, (step + first) / max(1, warmup))
    return (1 + cos(pi * min(1.0, (step - warmup) / decay))) / 2


class Schedule(LambdaLR):
    """Learning rates times a factor that depends on the step alone. A resumed run
    has the rates and the length of its own options.

    PyTorch's schedulers take these from the checkpoint, so that a lower --model.lr would do nothing.
    """

    def __init__(self, optimizer: Optimizer, warmup: int = 0, first: int = 1, decay: int = 0) -> None:
        """As of factor."""
        super().__init__(optimizer, partial(factor, warmup=warmup, first=first, decay=decay))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the step of a state, which may be of PyTorch's SequentialLR, as former versions had."""
        own: list[Any] = list(self.base_lrs)
        lambdas: list[Callable[[int], float]] = self.lr_lambdas
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        for group, rate, of_step in zip(self.optimizer.param_groups, own, lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * of_step(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
