"""What is kept of each sample of a shard, to count by: what broke it, digests, lengths of captions, the size of its image.

Samples are read and decoded as in training, so what is broken here is what training would leave out.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import IterableDataset

from fromage.data.broken import Broken, read_shards
from fromage.data.sample_images import from_npy
from fromage.data.shard_names import shard_name
from fromage.data.shard_sizes import sized
from fromage.data.shards import Raw, captions_of, image_of
from fromage.data.workers import worker_share
from fromage.errors import BrokenSample
from fromage.images.codec import SUFFIXES, jpeg
from fromage.images.locators import locator

TILE = 160  # pixels of an image on the contact sheet
Measure = Callable[[str], int]  # the length of a caption


def count_words(text: str) -> int:
    """Words of a caption, separated by white space."""
    return len(text.split())


class Record(NamedTuple):
    """What is kept of a sample of a shard, or of a loss that belongs to no sample, such as the torn end of a shard."""

    shard: str
    key: str = ""
    broken: str = ""  # 'cause: detail', as BrokenSample has it
    lost: int = 0  # samples that sizes.json promises and the shard does not hold
    lengths: tuple[int, ...] = ()  # of its captions, as they are measured
    size: tuple[int, int] | None = None  # width and height in pixels; None for stored features
    image: int = 0  # digests of the image's bytes, and of captions and image
    pair: int = 0
    draw: int = 0  # the sample's place in a random order of all
    shown: tuple[bytes, str] | None = None  # a small JPEG and the captions, of candidates for the contact sheet

    @property
    def name(self) -> str:
        """'shards/00000.tar#key', as images.open_image takes it."""
        return locator(self.shard, self.key) if self.key else self.shard


def digest(*parts: bytes) -> int:
    """A hash of 64 bits: ten million samples hold a collision with a probability of 1 in 400,000."""
    return int.from_bytes(blake2b(b"\0".join(parts), digest_size=8).digest(), "big")


class CollectedLosses(Broken):
    """Collects what a shard loses, as records; there is no limit and nothing is logged."""

    def __init__(self, name: str) -> None:
        """name: of the shard, in the records."""
        super().__init__(limit=1.0)
        self.name = name
        self.records: list[Record] = []

    def lose(self, shard: str, cause: str) -> None:
        """Collect a shard that cannot be read to its end, or a member that belongs to no sample."""
        self.records.append(Record(self.name, broken=" ".join(cause.split())))

    def lacks(self, shard: str, found: int, size: int) -> None:
        """Collect how many samples the shard holds too few."""
        self.records.append(Record(self.name, lost=size - found))

    def exceeds(self, shard: str, size: int) -> None:
        """Collect that the shard holds more samples than it should."""
        self.records.append(Record(self.name, broken=f"more than the {size} samples that sizes.json says"))


class RecordReader(IterableDataset[Record]):
    """A record of every sample; worker w of W reads the shards w, w + W, w + 2 W and so on."""

    def __init__(self, shards: list[str], measure: Measure, shown: int) -> None:
        self.shards = sized(shards)
        self.measure, self.shown = measure, shown
        self.width: int | None = None  # of stored features, that of the first ones
        self.first: list[int] = []  # a heap of the negative draws of the candidates so far

    def __iter__(self) -> Iterator[Record]:
        worker, workers = worker_share()
        for shard in self.shards[worker::workers]:
            name = shard[0] if Path(shard[0]).is_file() else shard_name(shard[0])
            losses = CollectedLosses(name)
            for raw in read_shards([shard], losses):
                yield self.record(name, raw)
            yield from losses.records

    def record(self, shard: str, raw: Raw) -> Record:
        """Decode a sample and measure it."""
        key, image = raw["__key__"], None
        try:
            captions = captions_of(raw)
            if "npy" in raw:
                self.width = len(from_npy(raw["npy"], self.width))
            else:
                image = image_of(raw)
        except BrokenSample as error:
            return Record(shard, key, str(error))
        data = next(raw[kind] for kind in ("npy", *SUFFIXES) if kind in raw)
        lengths, pair = tuple(map(self.measure, captions)), digest(*(text.encode() for text in captions), data)
        record = Record(shard, key, "", 0, lengths, None, digest(data), pair)
        if image is None:
            return record
        draw = digest(shard.encode(), key.encode())
        shown = (jpeg(image, TILE), "\n".join(captions)) if self.is_candidate(draw) else None
        return record._replace(size=image.size, draw=draw, shown=shown)

    def is_candidate(self, draw: int) -> bool:
        """Whether a sample is among the first `shown` of the random order, as far as samples were read."""
        if len(self.first) < self.shown:
            heapq.heappush(self.first, -draw)
            return True
        return bool(self.first) and -heapq.heappushpop(self.first, -draw) != draw
