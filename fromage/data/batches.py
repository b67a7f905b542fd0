"""Batches of FROMAGe: a stored sample -> a row (Sample) -> a batch. Captions are truncated in fromage.data.tokenizer.

An image counts once however many captions it has. Training draws one of them in each epoch; validation has all of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fromage.data.padding import pad
from fromage.data.requests import request
from fromage.data.sample_images import ImageReader, Images, stacked
from fromage.data.shards import Raw, captions_of
from fromage.data.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from fromage.data.tuples import TupleBatch

EPOCH = "__epoch__"  # of a stored sample, set by the training stream: the pass that it is read in


class FurtherTexts(NamedTuple):
    """Further texts of a batch's images: captions after the first one of each, or requests."""

    captions: list[str]  # N
    ids: Tensor  # (N, T) int64, as of Batch
    lengths: list[int]  # N, as of Batch
    rows: list[int]  # N: which image of the batch each belongs to

    def part(self, start: int, stop: int) -> FurtherTexts:
        """The texts from start to stop, with padding cut to the longest of them."""
        part = FurtherTexts(*(field[start:stop] for field in self))  # type: ignore[arg-type]
        return part._replace(ids=part.ids[:, : max(part.lengths)])


class Batch(NamedTuple):
    """Images or their features, and a caption of each. A batch has either pixels or features."""

    keys: list[str]
    captions: list[str]
    ids: Tensor  # (B, T) int64: bos y_1 ... y_n [RET], right-padded
    lengths: list[int]  # B: tokens of each caption, all [RET] included, without padding; on the host, for packing
    pixels: Tensor | None  # (B, 3, H, W) uint8, resized and cropped; another transform may give float
    features: Tensor | None  # (B, m) stored pooled features, in the dtype of their tower
    more: FurtherTexts | None = None  # of validation: the images' other captions
    requests: FurtherTexts | None = None  # of training: B texts, some of them captions framed as requests (data.requests)
    tuples: TupleBatch | None = None  # of training: a batch of tuples, for the composition losses of the same step

    @property
    def queries(self) -> Batch:
        """The batch as the retrieval pass reads it: with requests in place of the captions that were framed as such."""
        if self.requests is None:
            return self
        captions, ids, lengths, _ = self.requests
        return self._replace(captions=captions, ids=ids, lengths=lengths, requests=None)

    def part(self, start: int, stop: int) -> Batch:
        """The pairs from start to stop, with padding cut to the longest of them, without other captions and tuples."""
        plain = self._replace(more=None, requests=None, tuples=None)
        rows: Any = Batch(*(None if field is None else field[start:stop] for field in plain))  # type: ignore[arg-type]
        requests = self.requests and self.requests.part(start, stop)
        return rows._replace(ids=rows.ids[:, : max(rows.lengths)], requests=requests)

    def others(self) -> Iterator[FurtherTexts]:
        """The captions in `more`, at most B at a time, with padding cut to the longest of them."""
        B, more = len(self.keys), self.more
        for start in range(0, len(more.rows), B) if more else ():
            yield more.part(start, start + B)  # type: ignore[union-attr]

    @property
    def owners(self) -> Tensor:
        """(B + N,) int64: which image of the batch each caption belongs to, first captions first, then those in `more`."""
        return torch.tensor([*range(len(self.keys)), *(self.more.rows if self.more else [])])


class Sample(NamedTuple):
    """One row of a batch."""

    key: str
    captions: list[str]  # at least one
    ids: list[list[int]]  # of each caption
    image: Images  # (3, H, W) or (m,)
    request: tuple[str, list[int]] | None = None  # the caption framed as a request, and its ids


@dataclass
class SamplePreprocessor:
    """A stored sample -> a row of a batch.

    Attributes:
        read: reads the image of a sample.
        captions: of an image, how many are used at most; None for all.
        seed: of the caption that training draws, and of whether it is framed as a request.
        requests: share of the captions of training that the retrieval pass reads as requests; see fromage.data.requests.
    """

    shards_option: ClassVar[str] = "data.train_shards"
    size_option: ClassVar[str] = "data.batch_size"
    shuffle_option: ClassVar[str] = "data.shuffle"

    read: ImageReader
    tokenizer: PromptTokenizer
    max_tokens: int
    captions: int | None = None
    seed: int = 0
    requests: float = 0.0

    def layout(self) -> dict[str, Any]:
        """See fromage.data.streams.Decoder."""
        return {"data.captions_per_image": self.captions, "data.requests": self.requests}

    def collate(self, samples: list[Sample]) -> Batch:
        """Rows -> a batch, padded with the tokenizer's pad."""
        return collate(samples, self.tokenizer.pad_id)

    def __call__(self, raw: Raw) -> Sample:
        """Raises BrokenSample."""
        captions, asked = captions_of(raw)[: self.captions], None
        if EPOCH in raw:
            captions = [captions[drawn(len(captions), self.seed, raw["__key__"], raw[EPOCH])]]
            asked = request(captions[0], self.requests, self.seed, raw["__key__"], raw[EPOCH])
        image = self.read(raw)
        ids = [self.tokenizer.caption(caption, self.max_tokens) for caption in captions]
        framed = None if asked is None else (asked, self.tokenizer.caption(asked, self.max_tokens))
        return Sample(raw["__key__"], captions, ids, image, framed)


def drawn(n: int, seed: int, key: str, epoch: int) -> int:
    """Which of n captions an image has in an epoch: within n epochs each comes once, in an order of its own each time."""
    if n == 1:
        return 0
    turn, place = divmod(epoch, n)
    return random.Random(f"{seed}/{key}/{turn}").sample(range(n), n)[place]


def collate(samples: list[Sample], pad_id: int) -> Batch:
    """Rows -> a batch. Raises UserError if some rows have features and others images."""
    keys, captions, ids, images, framed = (list(column) for column in zip(*samples, strict=True))
    return Batch(
        keys,
        [said[0] for said in captions],
        *padded([rows[0] for rows in ids], pad_id),
        *stacked(images, keys[0], "shards"),  # (B, 3, H, W), or (B, m)
        others(samples, pad_id),
        requests(samples, pad_id) if any(framed) else None,
    )


def others(samples: list[Sample], pad_id: int) -> FurtherTexts | None:
    """The captions after the first one of each row; None where there are none."""
    if not (rows := [i for i, sample in enumerate(samples) for _ in sample.captions[1:]]):
        return None
    captions = [text for sample in samples for text in sample.captions[1:]]
    return FurtherTexts(captions, *padded([row for sample in samples for row in sample.ids[1:]], pad_id), rows)


def requests(samples: list[Sample], pad_id: int) -> FurtherTexts:
    """What the retrieval pass reads of each row: its request, or else its caption."""
    read = [sample.request or (sample.captions[0], sample.ids[0]) for sample in samples]
    return FurtherTexts([text for text, _ in read], *padded([ids for _, ids in read], pad_id), list(range(len(read))))


def padded(ids: list[list[int]], pad_id: int) -> tuple[Tensor, list[int]]:
    """Token ids of B texts -> (B, T), right-padded, and the length of each."""
    return pad(ids, pad_id)[0], [len(row) for row in ids]
