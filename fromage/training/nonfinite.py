"""Losses and gradients that are NaN or infinite: no update from them, and a message that names the samples."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fromage.errors import UserError

SHOWN = 8  # sample keys in a message
log = logging.getLogger(__name__)


class Update(NamedTuple):
    """What is known of an update, on its way to the host."""

    step: int
    keys: list[str]
    values: Tensor  # (2 + M n,) float32: left out on any device?, norm of gradients, M losses of n micro-batches
    arrived: torch.cuda.Event | None  # None: it is here


class NonFiniteGuard:
    """Watches the losses and gradients of a run, and never waits for the device.

    An update from anything that is not finite is left out on the device itself, by the `found_inf` that PyTorch's fused
    optimisers heed; the host learns of it once the figures have come, a step or so later.
    """

    def __init__(self, skip: bool, names: Sequence[str]) -> None:
        """skip: go on after such an update, with a warning; else `check` raises. names: of the losses, M of them."""
        self.skip, self.skipped, self.names = skip, 0, names
        self._losses: list[Tensor] = []  # (M,) each, since the last update
        self._keys: list[str] = []
        self._updates: deque[Update] = deque()

    def see(self, losses: Iterable[Tensor], keys: list[str]) -> None:
        """Take the losses, scalars in the order of their names, of a micro-batch, and its samples' keys."""
        self._losses.append(torch.stack([loss.detach().float() for loss in losses]))
        self._keys += keys

    def before_update(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Tell a fused optimiser, now that the gradients are there, whether to leave its next update out."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        values = torch.cat([torch.nn.utils.get_total_norm(gradients).reshape(1), *self._losses])  # (1 + M n,)
        found = (~values.isfinite().all()).float().reshape(1)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        optimizer.found_inf = found[0]  # type: ignore[attr-defined]
        self._updates.append(Update(step, self._keys, *_to_host(torch.cat([found, values]))))
        self._losses, self._keys = [], []

    def check(self, last_good: str, wait: bool = False) -> None:
        """Read what has come. Raises UserError for an update that was left out, unless these are to be skipped.

        Args:
            last_good: the checkpoint to go on from, for the message.
            wait: wait for what is on its way.
        """
        while self._updates and (wait or self._updates[0].arrived is None or self._updates[0].arrived.query()):
            update = self._updates.popleft()
            if update.arrived is not None:
                update.arrived.synchronize()
            if update.values[0]:
                self._report(update, last_good)

    def _report(self, update: Update, last_good: str) -> None:
        _, norm, *losses = update.values.tolist()
        said = [f"{name} loss {value:.4g}" for name, value in zip(cycle(self.names), losses, strict=False)]
        said += [f"gradient norm {norm:.4g}"]
        more = f" and {len(update.keys) - SHOWN} more" if len(update.keys) > SHOWN else ""
        samples = f"samples {', '.join(update.keys[:SHOWN])}{more}; {', '.join(said)}"
        what = f"step {update.step}: not finite, here or on another device ({samples}); no update was made"
        if not self.skip:
            remedy = "look at the samples or lower model.lr, or leave such updates out with --model.nonfinite skip"
            raise UserError(f"{what}. Last good checkpoint: {last_good}; {remedy}")
        self.skipped += 1
        log.warning("%s; %d so far", what, self.skipped)


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Values on their way to the host, and what to ask whether they have come."""
    if not values.is_cuda:
        return values, None
    there = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return there, arrived
