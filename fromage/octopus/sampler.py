"""The order of training rows: a new one in each epoch, divided among devices; a resumed run takes it up where it stood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from random import Random
from typing import Any

from torch.utils.data import Dataset, DistributedSampler

WINDOW = 50  # batches whose rows are sorted by length together, as of Hugging Face's group_by_length


class ResumableSampler(DistributedSampler[Any]):
    """The numbers of rows, in order; for exact resume the first epoch can start at a later one."""

    def __init__(
        self, rows: Dataset[Any], trainer: Any, seed: int, begin: int, batch_size: int, lengths: Sequence[int] | None = None
    ) -> None:
        """begin: rows per device that a resumed run has already seen in its epoch.

        lengths: of the rows, in any unit, where batches are to hold rows of like length. Devices then have such batches in
        the same step, too.
        """
        super().__init__(rows, trainer.world_size, trainer.global_rank, shuffle=True, seed=seed, drop_last=True)
        self.begin, self.batch_size, self.lengths = begin, batch_size, lengths

    def __iter__(self) -> Iterator[int]:
        begin, self.begin = self.begin, 0
        order = list(super().__iter__())
        if self.lengths is not None:
            order = grouped(order, self.lengths, self.batch_size, Random(f"{self.seed} {self.epoch}"))
        return islice(order, begin, None)


def grouped(order: Sequence[int], lengths: Sequence[int], batch_size: int, random: Random) -> list[int]:
    """An order of the same rows, whose batches hold rows of like length.

    The rows of each WINDOW batches are sorted, and the batches shuffled. Those left over at the end stay there.
    """
    whole, size = len(order) // batch_size * batch_size, WINDOW * batch_size
    found: list[int] = []
    for start in range(0, whole, size):
        window = sorted(order[start : min(start + size, whole)], key=lambda row: -lengths[row])
        batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        random.shuffle(batches)
        found += chain.from_iterable(batches)
    return [*found, *order[whole:]]
