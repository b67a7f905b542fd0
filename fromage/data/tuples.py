"""Tuples for composition learning: an image, a condition ("but at night"), and the caption of what both together ask for.

A stored tuple is a sample as captions have it, KEY.jpg and KEY.txt of the reference image, with "condition" and
"target_caption" in KEY.json, and with KEY.target.jpg where the image that is asked for is there. Stored features have
KEY.npy and KEY.target.npy in place of the images.

Source: Li et al., "Improving Context Understanding in Multimodal Large Language Models via Multimodal Composition
Learning" (MCL), ICML 2024, section 3; its tuples have no target images.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from fromage.data.batches import padded
from fromage.data.sample_images import ImageReader, Images, stacked, target_image
from fromage.data.shards import Raw, plain_text
from fromage.data.tokenizer import PromptTokenizer
from fromage.errors import BrokenSample
from fromage.io import json_object

CONDITION, TARGET = "condition", "target_caption"  # in KEY.json
NO_IMAGE = "no target image is read, and a caption alone is learned in CLIP's space: give model.space clip, or target images"
OTHER = "no tuple: no {} in member json; pack tuples with fromage shards tuples"


class TupleBatch(NamedTuple):
    """B reference images, each with a condition and the caption of the target. They have either pixels or features."""

    keys: list[str]
    targets: list[str]  # B captions of the targets, as text
    conditions: Tensor  # (B, T) int64: bos c_1 ... c_m [RET], right-padded
    lengths: list[int]  # B: tokens of each condition, all [RET] included, without padding; on the host, for packing
    captions: Tensor  # (B, T') int64: y_1 ... y_n, right-padded: the target caption as it follows the condition
    caption_lengths: list[int]  # B
    pixels: Tensor | None  # (B, 3, H, W), as of Batch
    features: Tensor | None  # (B, m)
    target_rows: list[int]  # n: which tuples have a target image
    target_images: Images | None  # those n target images; None where there is none

    def part(self, start: int, stop: int) -> TupleBatch:
        """The tuples from start to stop, without target images; padding stays."""
        fields = self._replace(target_images=None)._asdict()
        cut: dict[str, Any] = {name: None if field is None else field[start:stop] for name, field in fields.items()}
        return self._replace(**{**cut, "target_rows": []})


class TupleSample(NamedTuple):
    """One row of a batch of tuples."""

    key: str
    target: str
    condition: list[int]  # bos c_1 ... c_m [RET]
    caption: list[int]  # y_1 ... y_n
    image: Images  # (3, H, W) or (m,)
    target_image: Images | None


@dataclass
class TuplePreprocessor:
    """A stored tuple -> a row of a batch; max_tokens is the limit of a condition with [RET], and of a target caption.

    Attributes:
        read: reads an image of a tuple.
        images: whether target images are read; without them the captions alone say what is asked for.
        all_shown: whether a tuple without target image cannot be learned from, so that it counts as broken.
    """

    shards_option: ClassVar[str] = "data.train_tuples"
    size_option: ClassVar[str] = "data.tuple_batch_size"
    shuffle_option: ClassVar[str] = "data.tuple_shuffle"

    read: ImageReader
    tokenizer: PromptTokenizer
    max_tokens: int
    images: bool = True
    all_shown: bool = False

    def layout(self) -> dict[str, Any]:
        """See fromage.data.streams.Decoder."""
        return {"data.target_images": self.images}

    def __call__(self, raw: Raw) -> TupleSample:
        """Raises BrokenSample."""
        condition, target = texts_of(raw)
        ids, following = composed_ids(self.tokenizer, condition, target, self.max_tokens)
        shown = target_image(raw) if self.images else {}
        if self.all_shown and not shown:
            raise BrokenSample(NO_IMAGE)
        return TupleSample(raw["__key__"], target, ids, following, self.read(raw), self.read(shown) if shown else None)

    def collate(self, samples: list[TupleSample]) -> TupleBatch:
        """Rows -> a batch, padded with the tokenizer's pad. Raises UserError for features beside images without them."""
        keys, targets, conditions, captions, images, found = zip(*samples, strict=True)
        pad_id, rows = self.tokenizer.pad_id, [i for i, image in enumerate(found) if image is not None]
        texts = *padded(list(conditions), pad_id), *padded(list(captions), pad_id)
        target_images = stacked([found[i] for i in rows], keys[0], "tuples") if rows else None
        return TupleBatch(list(keys), list(targets), *texts, *stacked(images, keys[0], "tuples"), rows, target_images)


def texts_of(raw: Raw) -> tuple[str, str]:
    """The condition and the target caption of a stored tuple. Raises BrokenSample where one is missing or empty."""
    fields = json_object(raw.get("json", b""))
    for name in (CONDITION, TARGET):
        if name not in fields:
            raise BrokenSample(OTHER.format(name))
        if not plain_text(fields[name]):
            raise BrokenSample(f"empty {name.replace('_', ' ')}")
    return plain_text(fields[CONDITION]), plain_text(fields[TARGET])


def composed_ids(tokenizer: PromptTokenizer, condition: str, target: str, max_tokens: int) -> tuple[list[int], list[int]]:
    """bos c_1 ... c_m [RET], and y_1 ... y_n: the target caption as it is tokenised after the condition and a space."""
    alone, both = tokenizer.encode(condition), tokenizer.encode(f"{condition} {target}")
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(alone, both, strict=False)))
    return tokenizer.caption(condition, max_tokens), both[min(same, len(both) - 1) :][:max_tokens]
