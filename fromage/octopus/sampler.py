"""The order of training rows: a new one in each epoch, divided among devices; a resumed run takes it up where it stood."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, DistributedSampler


class ResumableSampler(DistributedSampler[Any]):
    """The numbers of rows, in order; for exact resume an epoch can start at a later one."""

    def __init__(self, rows: Dataset[Any], trainer: Any, seed: int, begin: Callable[[], int]) -> None:
        """begin: gives the rows per device that a resumed run has already seen of the epoch that begins.

        It is asked when the epoch begins: Lightning may make loaders before it knows where a run goes on.
        """
        super().__init__(rows, trainer.world_size, trainer.global_rank, shuffle=True, seed=seed, drop_last=True)
        self.begin = begin

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.begin(), None)
