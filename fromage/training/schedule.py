"""The learning rate of a run: linear warm-up, then constant or a cosine decay."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, SequentialLR


class CosineToZero(CosineAnnealingLR):
    """A cosine from lr to zero that stays there; PyTorch's own rises again."""

    def get_lr(self) -> list[float | Tensor]:
        """Of each group of parameters."""
        return [0.0 for _ in self.base_lrs] if self.last_epoch > self.T_max else super().get_lr()


def warmup_then(optimizer: Optimizer, warmup: int, first: int, decay: int) -> LRScheduler:
    """The factor of the learning rate in step n = 0, 1 ...: (n + first) / warmup, at most 1, for `warmup` steps.

    Behind them it is 1, or falls to 0 along a cosine of `decay` steps; decay 0 is without one.
    """
    rising = LambdaLR(optimizer, lambda step: min(1.0, (step + first) / max(1, warmup)))
    if not decay:
        return rising
    return SequentialLR(optimizer, [rising, CosineToZero(optimizer, decay)], [warmup])
