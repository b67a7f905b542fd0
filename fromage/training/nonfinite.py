"""NaN or infinite losses and gradients: the update is skipped, and a message names the samples."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fromage.errors import UserError, first_few

SHOWN = 8  # sample keys in a message
log = logging.getLogger(__name__)


class Update(NamedTuple):
    """Losses and gradient norm of an update, while they are copied to the host."""

    step: int
    keys: list[str]
    names: list[str]  # of the M losses, those of one micro-batch after those of another
    values: Tensor  # (2 + M,) float32: whether skipped, gradient norm, losses
    arrived: torch.cuda.Event | None  # set when the copy is done; None: it is done


class NonFiniteGuard:
    """Checks the losses and gradients of a run without waiting for the device.

    The device itself skips an update from non-finite values: PyTorch's fused optimisers read `found_inf`. The host learns of
    it when the values have been copied, about a step later.
    """

    def __init__(self, skip: bool) -> None:
        """skip: continue after a skipped update, with a warning; else `check` raises."""
        self.skip, self.skipped = skip, 0
        self._losses: list[Tensor] = []  # scalars, since the last update
        self._names: list[str] = []  # of the losses
        self._keys: list[str] = []  # of the samples
        self._updates: deque[Update] = deque()

    def see(self, losses: Mapping[str, Tensor], keys: list[str]) -> None:
        """Record the losses of a micro-batch, scalars by their names in messages, and the keys of its samples."""
        self._losses += [loss.detach().float() for loss in losses.values()]
        self._names += losses
        self._keys += keys

    def before_update(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Tell a fused optimiser whether to skip its next update; called after the backward."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of all devices
        values = torch.stack([norm, *self._losses])  # (1 + M,)
        found = (~values.isfinite().all()).float().reshape(1)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        optimizer.found_inf = found[0]  # type: ignore[attr-defined]
        self._updates.append(Update(step, self._keys, self._names, *_to_host(torch.cat([found, values]))))
        self._losses, self._names, self._keys = [], [], []

    def check(self, last_good: str, wait: bool = False) -> None:
        """Read the values that have arrived. Raises UserError for a skipped update, unless `skip` is set.

        Args:
            last_good: checkpoint to resume from, for the message.
            wait: wait for values that are still being copied.
        """
        while self._updates and (wait or self._updates[0].arrived is None or self._updates[0].arrived.query()):
            update = self._updates.popleft()
            if update.arrived is not None:
                update.arrived.synchronize()
            if update.values[0]:
                self._report(update, last_good)

    def _report(self, update: Update, last_good: str) -> None:
        _, norm, *losses = update.values.tolist()
        said = [f"{name} loss {value:.4g}" for name, value in zip(update.names, losses, strict=True)]
        said += [f"gradient norm {norm:.4g}"]
        samples = f"samples {first_few(update.keys, few=SHOWN)}; {', '.join(said)}"
        what = f"step {update.step}: not finite, here or on another device ({samples}); no update was made"
        if not self.skip:
            remedy = "look at the samples or lower model.lr, or leave such updates out with --model.nonfinite skip"
            raise UserError(f"{what}. Last good checkpoint: {last_good}; {remedy}")
        self.skipped += 1
        log.warning("%s; %d so far", what, self.skipped)


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start copying values to the host; returns the copy and the event that tells when it is done."""
    if not values.is_cuda:
        return values, None
    there = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return there, arrived
