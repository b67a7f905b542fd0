"""Shards of pictures (or stored features) and captions -> batches, for training and validation.

Training deals shards out to devices and workers, another order in every epoch; validation deals out whole batches, so that
every sample comes once, in stored order, whatever the number of devices and workers.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, count, groupby, islice, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import pytorch_lightning as pl
import torch
import webdataset as wds
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset

from fromage.errors import UserError
from fromage.features import check_features, from_npy
from fromage.image_transform import Decoding, Transform, decoding_as, read_picture
from fromage.loader import Loader, Plain, TrainLoader, no_loaders
from fromage.shards import (
    Broken,
    Raw,
    caption_of,
    decoded,
    expand,
    picture_file,
    read_shards,
    shard_name,
    shard_sizes,
    worker_share,
)

if TYPE_CHECKING:
    from fromage.tokens import PromptTokenizer


class Batch(NamedTuple):
    """Pictures or their features, and captions. Pixels and features are never both there."""

    keys: list[str]
    captions: list[str]
    ids: Tensor  # (B, T) int64: bos y_1 ... y_n [RET], right-padded
    lengths: list[int]  # B: tokens before the padding, [RET] included; on the host, for whoever lays out rows
    pixels: Tensor | None  # (B, 3, H, W) uint8, resized and cropped, or as another transform gives them
    features: Tensor | None  # (B, m) stored pooled features, in the dtype of the tower that made them

    def part(self, start: int, stop: int) -> Batch:
        """The pairs from start to stop, no further padded than these need."""
        rows: Any = Batch(*(None if field is None else field[start:stop] for field in self))  # type: ignore[arg-type]
        return rows._replace(ids=rows.ids[:, : max(rows.lengths)])


class Sample(NamedTuple):
    """One row of a batch."""

    key: str
    caption: str
    ids: list[int]
    pixels: Tensor | None  # (3, H, W)
    features: Tensor | None  # (m,)


# --- samples --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decode:
    """A stored sample -> a row of a batch."""

    transform: Transform
    tokenizer: PromptTokenizer
    max_tokens: int

    def __call__(self, raw: Raw) -> Sample:
        """Raises BrokenSample."""
        caption = caption_of(raw)
        features = from_npy(raw["npy"]) if "npy" in raw else None
        pixels = read_picture(picture_file(raw), self.transform) if features is None else None
        return Sample(raw["__key__"], caption, self.tokenizer.caption(caption, self.max_tokens), pixels, features)


def collate(samples: list[Sample], pad_id: int) -> Batch:
    """Rows -> a batch. Raises UserError where some rows hold features and others pictures."""
    keys, captions, ids, pixels, features = (list(column) for column in zip(*samples, strict=True))
    if any(p is None for p in pixels) and any(f is None for f in features):
        raise UserError(f"some shards hold features, others only pictures (near {keys[0]}): name shards of one kind")
    return Batch(
        keys,
        captions,
        pad_sequence([torch.tensor(row) for row in ids], batch_first=True, padding_value=pad_id),  # (B, T)
        [len(row) for row in ids],
        None if pixels[0] is None else torch.stack(pixels),  # (B, 3, H, W)
        None if features[0] is None else torch.stack(features),  # (B, m)
    )


# --- streams of batches ---------------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    """The batches of one device, made in its workers.

    Attributes:
        batches: how many batches an epoch has, None where nothing says how many samples the shards hold.
    """

    batches: int | None

    def __init__(
        self, shards: list[str], decode: Decode, batch_size: int, max_broken: float, rank: int = 0, world: int = 1
    ) -> None:
        self.shards = list(zip(shards, shard_sizes(shards), strict=True))
        sizes = [size for _, size in self.shards if size is not None]
        self.samples = sum(sizes) if len(sizes) == len(shards) else None
        self.decode, self.batch_size, self.max_broken = decode, batch_size, max_broken
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        if self.batches is None:
            raise TypeError("the length is unknown: there is no sizes.json beside the shards")
        return self.batches

    def collate(self, samples: list[Sample]) -> Batch:
        """Rows -> a batch, padded with the tokenizer's pad."""
        return collate(samples, self.decode.tokenizer.pad_id)


class ValidationStream(Stream):
    """All samples once, in stored order: batch i is made by device i mod world, so no device lacks more than one batch.

    Every worker reads all shards, and decodes only what its own batches need.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        every = None if self.samples is None else -(-self.samples // self.batch_size)
        if every is not None and every < self.world:
            raise UserError(f"{every} validation batches are too few for {self.world} devices: lower val_batch_size")
        self.batches = None if every is None else len(range(self.rank, every, self.world))

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = worker_share()
        mine, turn = self.rank + self.world * worker, self.world * workers
        broken, held = Broken(self.max_broken), None
        raws = enumerate(read_shards(self.shards, broken))
        for number, group in groupby(raws, key=lambda item: item[0] // self.batch_size):
            if number % turn != mine:
                continue
            samples = list(decoded((raw for _, raw in group), self.decode, broken))
            if samples:
                if held is not None:
                    yield held
                held = self.collate(samples)
        broken.check(end=True)  # before the last batch: whoever knows the length asks for no more
        if held is not None:
            yield held


class TrainStream(Stream):
    """Shuffled full batches. Each epoch deals the shards anew to devices and workers, by (seed, epoch).

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

    def __iter__(self) -> Iterator[tuple[Batch, int, int]]:
        epoch, turn = self.start[0].tolist()
        number, workers = worker_share()
        worker = (number + turn) % workers  # PyTorch asks its workers in order, from the first
        first, taken = self.start[1 + worker].tolist()
        dealt = self.shuffled(self.shards, epoch)[self.rank :: self.world]
        parts = [dealt[w::workers] for w in range(workers)]
        quota = self.quotas(parts)[worker] if self.batches is not None else None
        broken = Broken(self.max_broken)
        broken.good = first * self.batch_size
        broken.bad = taken - broken.good
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
            yield self.collate(batch), worker, broken.good + broken.bad

    def layout(self) -> dict[str, Any]:
        """All that the order of samples follows from but the number of workers, by the option that sets it."""
        held = [(shard_name(shard), size) for shard, size in self.shards]
        return {
            "data.train_shards": f"{len(held)} shards {zlib.crc32(repr(held).encode()):08x}",
            "data.batch_size": self.batch_size,
            "data.shuffle": self.shuffle,
            "data.seed": self.seed,
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
        """A worker's stored samples, shuffled: one pass, or passes without end where the epoch's length is known."""
        for number in range(1) if self.batches is None else count():
            raws = read_shards(self.shuffled(part, epoch, number) if number else part, broken)
            if self.shuffle:
                rng = random.Random(f"{self.seed}/{epoch}/{number}/{self.rank}/{worker}")
                raws = wds.shuffle(self.shuffle, initial=self.shuffle, rng=rng)(raws)
            yield from raws
            broken.check(end=True)
            if not broken.good:
                raise UserError(f"there is no sample to train on in {', '.join(shard_name(s) for s, _ in part[:5])}")


# --- the data module ------------------------------------------------------------------------------------------------


class CC3M(pl.LightningDataModule):
    """Pairs of picture and caption in webdataset shards, as CC3M comes (paper, section 4); any such shards will do.

    Shards of stored features (fromage.features) are used in the same way: a member npy takes the picture's place.
    """

    def __init__(
        self,
        train_shards: str | list[str],
        val_shards: str | list[str] | None = None,
        batch_size: int = 180,
        val_batch_size: int | None = None,
        max_tokens: int = 24,
        workers: int = 4,
        shuffle: int = 10000,
        max_broken: float = 0.05,
        seed: int = 0,
        samples_per_epoch: int | None = None,
        exact_resume: bool = True,
        decoding: Decoding = "draft",
    ) -> None:
        """Name the data; nothing is read yet.

        Args:
            train_shards: Training shards: a folder, a pattern with braces (cc3m/{00000..00331}.tar), a glob, a URL, or a
                list of these.
            val_shards: Validation shards, in the same forms; null for none.
            batch_size: Pairs per training step on each device.
            val_batch_size: Pairs per validation step on each device; null for batch_size.
            max_tokens: Caption length in tokens, the start token and [RET] included; longer captions are cut before [RET].
            workers: Processes that decode pictures, per device; 0 decodes in the training process.
            shuffle: Shuffle buffer in pairs per worker, held undecoded in memory; 0 keeps the stored order.
            max_broken: Share (0 to 1) of broken samples above which a worker stops the run.
            seed: Seed of the order of shards and pairs; the epoch adds to it.
            samples_per_epoch: Training pairs of an epoch over all devices; null for as many as the shards hold.
            exact_resume: Refuse a checkpoint from the middle of an epoch that was dealt out otherwise (other shards, batch
                size, shuffle, seed, workers or devices); false begins such an epoch anew.
            decoding: How JPEGs are read: draft takes a large one at 1/2, 1/4 or 1/8 of its size, while that is at least
                twice what it is resized to; exact never does. Evaluation and index always take drafts.
        """
        super().__init__()
        self.train_shards, self.val_shards = train_shards, val_shards
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.max_tokens, self.workers, self.shuffle, self.max_broken = max_tokens, workers, shuffle, max_broken
        self.seed, self.samples_per_epoch, self.exact_resume, self.decoding = seed, samples_per_epoch, exact_resume, decoding
        self.transform: Transform | None = None
        self.tokenizer: PromptTokenizer | None = None

    def attach(self, transform: Transform, tokenizer: PromptTokenizer) -> None:
        """Set what pictures and captions go through, in place of what the trainer's model has."""
        self.transform, self.tokenizer = transform, tokenizer

    def setup(self, stage: str) -> None:
        """Look for the shards, before the towers are loaded. Raises UserError for those that are not there."""
        for urls in (self.train_shards if stage == "fit" else None, self.val_shards):
            if urls is not None:
                expand(urls)

    def train_dataloader(self) -> TrainLoader:
        """Shuffled full batches; see TrainStream. Raises UserError for shards that are not there."""
        shards, (rank, world) = self._shards(self.train_shards), self._rank()
        stream = TrainStream(
            shards,
            self._decode(),
            self.batch_size,
            self.max_broken,
            rank,
            world,
            shuffle=self.shuffle,
            seed=self.seed,
            samples_per_epoch=self.samples_per_epoch,
        )
        epoch, loop = (self.trainer.current_epoch, self.trainer.fit_loop) if self.trainer else (0, None)
        return TrainLoader(stream, min(self.workers, len(shards) // world), epoch, self.exact_resume, loop)

    def val_dataloader(self) -> Loader | list[Loader]:
        """All samples once and in order; see ValidationStream. An empty list where there are no validation shards."""
        if self.val_shards is None:
            return no_loaders()
        shards = self._shards(self.val_shards)
        stream = ValidationStream(shards, self._decode(), self.val_batch_size, self.max_broken, *self._rank())
        return Loader(stream, self.workers if stream.batches is None else min(self.workers, stream.batches))

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> Plain:
        """The validation samples; not as a DataLoader, which Lightning would rebuild with a sampler of its own."""
        return Plain(self.val_dataloader())  # type: ignore[arg-type]

    def _shards(self, urls: str | list[str]) -> list[str]:
        """Expand patterns, and compare stored features with the model's vision tower."""
        shards, model = expand(urls), self._model()
        if model is not None:
            check_features(shards, model.vision, self.decoding)
        return shards

    def _model(self) -> Any:
        return getattr(getattr(self.trainer, "lightning_module", None), "model", None)

    def _rank(self) -> tuple[int, int]:
        """This device's number and how many there are: the trainer's, else those of the environment."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else wds.utils.pytorch_worker_info()[:2]

    def _decode(self) -> Decode:
        model = self._model()
        transform = self.transform or (model and model.vision.transform)
        tokenizer = self.tokenizer or (model and model.tokenizer)
        if transform is None or tokenizer is None:
            raise RuntimeError("CC3M needs a transform and a tokenizer: call attach(transform, tokenizer), or use a Trainer")
        return Decode(decoding_as(transform, self.decoding), tokenizer, self.max_tokens)
