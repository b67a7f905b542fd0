"""Samples that cannot be used: left out, counted, and too many of them stop a run."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from math import ceil
from typing import TypeVar

from fromage.data.shard_names import shard_name
from fromage.data.shards import UNREAD, Raw, read_shard
from fromage.errors import BrokenSample, UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
CHECK_FROM = 100  # samples; a smaller stream is judged at its end


class Broken:
    """Counts the samples a worker used and those it could not, logs the latter, and stops when they are too many."""

    def __init__(self, limit: float, option: str = "max_broken", good: int = 0, bad: int = 0) -> None:
        """Begin to count.

        Args:
            limit: share of the samples, 0 to 1, that may be broken.
            option: what sets it.
            good: samples that were used before, by a run that is resumed.
            bad: those that could not be used before.
        """
        self.limit, self.option = limit, option
        self.good, self.bad, self.lost, self.missing = good, bad, 0, 0
        self.unread = 0  # of the lost: shards that another attempt may read to their end
        self.read = 0  # samples of all shards, where others use some of them
        self.last: deque[str] = deque(maxlen=5)

    @property
    def taken(self) -> int:
        """Samples that this worker took, used or not, those before a resumed run included."""
        return self.good + self.bad

    def used(self) -> None:
        """Count a sample that was used."""
        self.good += 1
        self.check()

    def passed(self, samples: int) -> None:
        """Count samples that this worker read, where it uses only some of what it reads."""
        self.read += samples

    def add(self, key: str, cause: str) -> None:
        """Count and log a sample that cannot be used."""
        self.bad += 1
        self._note(key, cause)

    def join(self, other: Broken) -> None:
        """Add what another counted, of other shards."""
        self.good, self.bad = self.good + other.good, self.bad + other.bad
        self.lost, self.missing = self.lost + other.lost, self.missing + other.missing
        self.unread += other.unread
        self.last.extend(other.last)
        self.check()

    def lose(self, shard: str, cause: str) -> None:
        """Count and log a shard that cannot be read to its end, or a member of it that belongs to no sample."""
        self.lost += 1
        self.unread += cause.startswith(UNREAD)
        self._note(shard, cause)

    def lacks(self, shard: str, found: int, size: int) -> None:
        """Count and log a shard that holds fewer samples than its size by sizes.json; the limit applies at the end."""
        self.missing += size - found
        self.last.append(f"{shard_name(shard)} ({found} samples of {size})")
        log.warning("%s holds %d samples, sizes.json says %d", shard, found, size)

    def exceeds(self, shard: str, size: int) -> None:
        """Raise UserError for a shard that holds more samples than its size by sizes.json: they would not be used."""
        told = f"{shard}: holds more samples than the {size} that sizes.json beside it says"
        raise UserError(f"{told}; remove sizes.json, or write the shards again")

    def _note(self, name: str, cause: str) -> None:
        cause = " ".join(cause.split())
        log.warning("skipped %s: %s", name, cause)
        self.last.append(f"{name} ({cause})")
        self.check()

    def check(self, end: bool = False) -> None:
        """Raise UserError where more than the limit is broken; a stream of under a hundred is judged at its end.

        Samples that a shard holds too few count at the end alone: shards are read ahead of their samples' use.
        """
        lost: float = self.lost + (self.missing if end else 0)
        if self.read:  # this worker's share of what all of them lose
            lost = lost * self.taken / self.read
        bad = self.bad + lost
        seen = bad + self.good
        if (end or seen >= CHECK_FROM) and bad > self.limit * seen:
            share = (
                f"{ceil(bad)} of {ceil(seen)} samples are broken ({bad / seen:.1%}, {self.option} allows {self.limit:.1%})"
            )
            raise UserError(f"{share}; the last: {', '.join(self.last)}; mend or remove them, or raise {self.option}")


def read_shards(shards: Iterable[tuple[str, int | None]], broken: Broken) -> Iterator[Raw]:
    """The stored samples of (shard, size) pairs, in order; what a shard holds too few, by sizes.json, counts as broken.

    Raises UserError for a shard that holds more.
    """
    for shard, size in shards:
        found = 0
        for raw in read_shard(shard, broken.lose):
            found += 1
            if size is not None and found == size + 1:
                broken.exceeds(shard, size)
            yield raw
        if size is not None and found < size:
            broken.lacks(shard, found, size)


def decoded(raws: Iterable[Raw], decode: Callable[[Raw], T], broken: Broken) -> Iterator[T]:
    """Decode stored samples, leaving out the broken ones."""
    for raw in raws:
        try:
            sample = decode(raw)
        except BrokenSample as error:
            broken.add(raw["__key__"], str(error))
            continue
        broken.used()
        yield sample
