"""Streams of batches, one per device, made in its workers.

Training deals shards out to devices and workers, in another order in every epoch; validation deals out whole batches, so
that every sample comes once, in stored order, whatever the number of devices and workers."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from itertools import accumulate, count, groupby, islice, pairwise
from typing import Any, ClassVar, Protocol

import webdataset as wds
from torch import Tensor
from torch.utils.data import IterableDataset

from fromage.data.batches import EPOCH
from fromage.data.broken import Broken, decoded, read_shards
from fromage.data.shard_names import shard_name
from fromage.data.shard_sizes import sized, total
from fromage.data.shards import Raw
from fromage.data.workers import worker_share
from fromage.errors import UserError


class Decoder(Protocol):
    """What makes rows of stored samples, and batches of rows.

    Attributes:
        shards_option, size_option, shuffle_option: the options that set the shards, the size of a batch and that of the
            shuffle buffer, for messages.
    """

    shards_option: ClassVar[str]
    size_option: ClassVar[str]
    shuffle_option: ClassVar[str]

    def __call__(self, raw: Raw) -> Any:
        """A stored sample -> a row. Raises BrokenSample."""

    def collate(self, samples: list[Any]) -> Any:
        """Rows -> a batch."""

    def layout(self) -> dict[str, Any]:
        """What else decides which row a sample gives, by option."""


class BatchStream(IterableDataset[Any]):
    """The batches of one device, made in its workers.

    Attributes:
        batches: how many batches an epoch has, None where nothing says how many samples the shards hold.
    """

    batches: int | None

    def __init__(
        self, shards: list[str], decode: Decoder, batch_size: int, max_broken: float, rank: int = 0, world: int = 1
    ) -> None:
        self.shards = sized(shards)
        self.samples = total(self.shards)
        self.decode, self.batch_size, self.max_broken = decode, batch_size, max_broken
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        if self.batches is None:
            raise TypeError("the length is unknown: there is no sizes.json beside the shards")
        return self.batches


class ValidationStream(BatchStream):
    """All samples once, in stored order: batch i is made by device i mod world, so no device lacks more than one batch.

    Every worker reads all shards, and decodes only what its own batches need.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        every = None if self.samples is None else -(-self.samples // self.batch_size)
        if every is None and self.world > 1:
            raise UserError("several devices need a known number of validation samples: there is no sizes.json beside them")
        if every is not None and every < self.world:
            raise UserError(f"{every} validation batches are too few for {self.world} devices: lower val_batch_size")
        self.batches = None if every is None else len(range(self.rank, every, self.world))

    def __iter__(self) -> Iterator[Any]:
        worker, workers = worker_share()
        mine, turn = self.rank + self.world * worker, self.world * workers
        broken, held = Broken(self.max_broken), None
        raws = enumerate(read_shards(self.shards, broken))
        for number, group in groupby(raws, key=lambda item: item[0] // self.batch_size):
            if number % turn != mine:
                broken.passed(sum(1 for _ in group))
                continue
            read = [raw for _, raw in group]
            broken.passed(len(read))
            samples = list(decoded(read, self.decode, broken))
            if samples:
                if held is not None:
                    yield held
                held = self.decode.collate(samples)
        broken.check(end=True)  # before the last batch: whoever knows the length asks for no more
        if held is not None:
            yield held


class TrainStream(BatchStream):
    """Shuffled full batches. Each epoch deals the shards again to devices and workers, by (seed, epoch).

    Each batch comes with the worker that made it and how many stored samples that took since the epoch began, so that the
    loader can say where the stream stands.

    Where the number of samples is known, every device makes the same number of batches, so that none waits for another in
    vain: a worker whose shards give less than its share goes through them again. Else an epoch is one pass.

    Attributes:
        start: (1 + workers, 2) int64 in shared memory, set by the loader: the epoch to begin and whose turn it is first;
            then for each worker the batches to leave out, and the stored samples they took.
    """

    start: Tensor

    def __init__(self, *args: Any, shuffle: int, seed: int, samples_per_epoch: int | None, **named: Any) -> None:
        super().__init__(*args, **named)
        self.shuffle, self.seed = shuffle, seed
        samples = samples_per_epoch or self.samples
        self.batches = None if samples is None else samples // (self.batch_size * self.world)
        if self.batches == 0:
            raise UserError(
                f"{samples} training samples are too few for batch_size {self.batch_size} on {self.world} devices: lower it"
            )
        if self.batches is None and self.world > 1:
            raise UserError("several devices need epochs of known length: give samples_per_epoch, or a sizes.json")
        if len(self.shards) < self.world:
            raise UserError(f"{len(self.shards)} training shards cannot feed {self.world} devices: write more shards")

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        epoch, turn = self.start[0].tolist()
        number, workers = worker_share()
        worker = (number + turn) % workers  # PyTorch asks its workers in order, from the first
        first, taken = self.start[1 + worker].tolist()
        dealt = self.shuffled(self.shards, epoch)[self.rank :: self.world]
        parts = [dealt[w::workers] for w in range(workers)]
        quota = self.quotas(parts)[worker] if self.batches is not None else None
        good = first * self.batch_size
        broken = Broken(self.max_broken, good=good, bad=taken - good)
        samples = decoded(islice(self.passes(parts[worker], epoch, worker, broken), taken, None), self.decode, broken)
        for number in count(first):
            if quota is not None and number >= quota:
                return
            batch = list(islice(samples, self.batch_size))
            if len(batch) < self.batch_size:
                if number == 0:
                    raise UserError(f"{len(batch)} samples in a worker are less than a batch: lower batch_size or workers")
                return
            if number + 1 == quota:
                broken.check(end=True)  # before the last batch: whoever knows the length asks for no more
            yield self.decode.collate(batch), worker, broken.taken

    def layout(self) -> dict[str, Any]:
        """All that the order of samples follows from but the number of workers, by the option that sets it."""
        held = [(shard_name(shard), size) for shard, size in self.shards]
        return {
            self.decode.shards_option: f"{len(held)} shards {zlib.crc32(repr(held).encode()):08x}",
            self.decode.size_option: self.batch_size,
            self.decode.shuffle_option: self.shuffle,
            "data.seed": self.seed,
            **self.decode.layout(),
            "devices": self.world,
            "batches per epoch": self.batches,
        }

    def shuffled(self, items: list[Any], *seed: int) -> list[Any]:
        """Items in the random order that belongs to the seed; in their own where shuffling is off."""
        return random.Random(f"{self.seed}/{seed}").sample(items, len(items)) if self.shuffle else list(items)

    def quotas(self, parts: list[list[tuple[str, int | None]]]) -> list[int]:
        """How many batches each worker makes, by the number of samples in its part, or of shards where that is unknown."""
        known = self.samples is not None
        ends = list(accumulate(sum((size or 0) if known else 1 for _, size in part) for part in parts))
        bounds = [(self.batches or 0) * end // max(ends[-1], 1) for end in [0, *ends]]
        return [b - a for a, b in pairwise(bounds)]

    def passes(self, part: list[tuple[str, int | None]], epoch: int, worker: int, broken: Broken) -> Iterator[Raw]:
        """A worker's stored samples, shuffled: one pass, or passes without end where the epoch's length is known.

        Each says as EPOCH which epoch it draws its caption for; a further pass draws as the next epoch does.
        """
        for number in range(1) if self.batches is None else count():
            raws = read_shards(self.shuffled(part, epoch, number) if number else part, broken)
            if self.shuffle:
                rng = random.Random(f"{self.seed}/{epoch}/{number}/{self.rank}/{worker}")
                raws = wds.shuffle(self.shuffle, initial=self.shuffle, rng=rng)(raws)
            for raw in raws:
                yield raw | {EPOCH: epoch + number}
            broken.check(end=True)
            if not broken.good:
                raise UserError(f"there is no sample to train on in {', '.join(shard_name(s) for s, _ in part[:5])}")
