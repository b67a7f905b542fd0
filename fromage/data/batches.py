"""Batches of FROMAGe: a stored sample -> a row (Sample) -> a batch. Captions are truncated in fromage.data.tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fromage.data.features import from_npy
from fromage.data.shards import Raw, caption_of, image_file
from fromage.data.tokenizer import PromptTokenizer
from fromage.errors import BrokenSample, UserError
from fromage.images.transforms import Transform, read_image


class Batch(NamedTuple):
    """Images or their features, and captions. A batch has either pixels or features."""

    keys: list[str]
    captions: list[str]
    ids: Tensor  # (B, T) int64: bos y_1 ... y_n [RET], right-padded
    lengths: list[int]  # B: tokens of each caption, [RET] included, without padding; on the host, for packing
    pixels: Tensor | None  # (B, 3, H, W) uint8, resized and cropped; another transform may give float
    features: Tensor | None  # (B, m) stored pooled features, in the dtype of their tower

    def part(self, start: int, stop: int) -> Batch:
        """The pairs from start to stop, with padding cut to the longest of them."""
        rows: Any = Batch(*(None if field is None else field[start:stop] for field in self))  # type: ignore[arg-type]
        return rows._replace(ids=rows.ids[:, : max(rows.lengths)])


class Sample(NamedTuple):
    """One row of a batch."""

    key: str
    caption: str
    ids: list[int]
    pixels: Tensor | None  # (3, H, W)
    features: Tensor | None  # (m,)


@dataclass
class Decode:
    """A stored sample -> a row of a batch.

    Attributes:
        width: m of stored features; None until the first ones are seen, whose width it then is.
    """

    transform: Transform
    tokenizer: PromptTokenizer
    max_tokens: int
    width: int | None = None

    def __call__(self, raw: Raw) -> Sample:
        """Raises BrokenSample."""
        caption = caption_of(raw)
        features = self._features(raw["npy"]) if "npy" in raw else None
        pixels = read_image(image_file(raw), self.transform) if features is None else None
        return Sample(raw["__key__"], caption, self.tokenizer.caption(caption, self.max_tokens), pixels, features)

    def _features(self, data: bytes) -> Tensor:
        features = from_npy(data)  # (m,)
        self.width = self.width or len(features)
        if len(features) != self.width:
            raise BrokenSample(f"features of another width: {len(features)}, not {self.width}")
        return features


def collate(samples: list[Sample], pad_id: int) -> Batch:
    """Rows -> a batch. Raises UserError if some rows have features and others images."""
    keys, captions, ids, pixels, features = (list(column) for column in zip(*samples, strict=True))
    if any(p is None for p in pixels) and any(f is None for f in features):
        raise UserError(f"some shards hold features, others only images (near {keys[0]}): name shards of one kind")
    return Batch(
        keys,
        captions,
        pad_sequence([torch.tensor(row) for row in ids], batch_first=True, padding_value=pad_id),  # (B, T)
        [len(row) for row in ids],
        None if pixels[0] is None else torch.stack(pixels),  # (B, 3, H, W)
        None if features[0] is None else torch.stack(features),  # (B, m)
    )
