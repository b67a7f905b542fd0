"""The order of training rows: a new one in each epoch, divided among devices; a resumed run takes it up where it stood."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, DistributedSampler


class ResumableSampler(DistributedSampler[Any]):
    """The numbers of rows, in order; for exact resume the first epoch can start at a later one."""

    def __init__(self, rows: Dataset[Any], trainer: Any, seed: int, begin: int) -> None:
        """begin: rows per device that a resumed run has already seen in its epoch."""
        super().__init__(rows, trainer.world_size, trainer.global_rank, shuffle=True, seed=seed, drop_last=True)
        self.begin = begin

    def __iter__(self) -> Iterator[int]:
        begin, self.begin = self.begin, 0
        return islice(super().__iter__(), begin, None)
