"""Shards on their way to the vision tower: read and preprocessed by workers, a batch of images at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fromage.data.broken import Broken, decoded, read_shards
from fromage.data.sample_images import target_image
from fromage.data.shard_sizes import sized
from fromage.data.shards import Raw, captions_of, image_file
from fromage.data.workers import worker_share
from fromage.images.transforms import Transform, read_image

MOST = 8  # times as many samples as images in a chunk


class Chunk(NamedTuple):
    """Part of a shard on its way to the tower. At the shard's end comes one without samples, with what of it is broken."""

    shard: str
    samples: list[Raw]
    images: list[list[int]]  # of each sample: numbers of its images, one or two, in the order in which they come
    pixels: Tensor | None  # (n, 3, H, W), of the images that come first in this chunk; None where there is none
    broken: Broken | None = None


class Row(NamedTuple):
    """A sample on its way into a chunk."""

    raw: Raw
    images: list[int]
    new: list[Tensor]  # (3, H, W), of those of its images that came in no sample before


class ChunkStream(IterableDataset[Chunk]):
    """The images of shards, preprocessed. Worker w of W takes the shards w, w + W, ...; each comes whole and in order.

    An image that several samples of a shard have, byte by byte, as those of a photograph with several captions, comes once.
    """

    def __init__(self, shards: list[str], transform: Transform, batch_size: int) -> None:
        self.shards, self.transform, self.batch_size = sized(shards), transform, batch_size

    def decode(self, known: dict[bytes, int], raw: Raw) -> Row:
        """A stored sample as a row; known: numbers of the images before it, by their digest, to which its own are added.

        Raises BrokenSample, for its captions as well.
        """
        captions_of(raw)
        files = [image_file(image) for image in filter(None, (raw, target_image(raw)))]
        keys = [blake2b(file, digest_size=16).digest() for file in files]
        new = {key: read_image(file, self.transform) for key, file in zip(keys, files, strict=True) if key not in known}
        known |= {key: len(known) + i for i, key in enumerate(new)}
        return Row(raw, [known[key] for key in keys], list(new.values()))

    def __iter__(self) -> Iterator[Chunk]:
        worker, workers = worker_share()
        for shard in self.shards[worker::workers]:
            broken, chunk = Broken(limit=1.0), list[Row]()  # counted here, judged where all are put together
            for row in decoded(read_shards([shard], broken), partial(self.decode, {}), broken):
                chunk.append(row)
                if sum(len(one.new) for one in chunk) >= self.batch_size or len(chunk) == MOST * self.batch_size:
                    yield self.chunk(shard[0], chunk)
                    chunk = []
            if chunk:
                yield self.chunk(shard[0], chunk)
            yield Chunk(shard[0], [], [], None, broken)

    def chunk(self, shard: str, rows: list[Row]) -> Chunk:
        """Rows -> a chunk."""
        new = [pixels for row in rows for pixels in row.new]
        return Chunk(shard, [row.raw for row in rows], [row.images for row in rows], torch.stack(new) if new else None)
