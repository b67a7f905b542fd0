"""Image files encoded by a vision tower: each once, in batches; images that are missing or broken are counted and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from fromage.data.workers import WorkerLoader
from fromage.errors import BrokenSample, UserError, first_few
from fromage.images.codec import decode_image
from fromage.images.open import file_bytes
from fromage.images.regions import Place, Region, file_at
from fromage.images.transforms import Framing, Several, Transform, framed_as, read_image
from fromage.models.base import VisualPrefixLM


@dataclass(frozen=True)
class Encoding:
    """How images are encoded.

    Attributes:
        batch_size: images in a pass.
        workers: processes that decode images; 0 decodes in this one.
        max_lost: share of the images, 0 to 1, that may be missing or broken.
    """

    batch_size: int = 64
    workers: int = 0
    max_lost: float = 0.05


@dataclass(frozen=True)
class Encoded:
    """Features of images.

    Attributes:
        views: features by framing: (n, m) pooled, or patches (n, P, m), on the model's device; float32 of encode_files.
        row: place of an image -> its row in each of these.
        lost: (cause, place) of the images that have none; causes are 'missing' and 'broken'.
    """

    views: dict[Framing, Tensor]
    row: dict[Place, int]
    lost: Sequence[tuple[str, Place]]

    @property
    def features(self) -> Tensor:
        """Those of the tower's own framing."""
        return self.views["own"]

    def of(self, paths: Sequence[Place], framing: Framing = "own") -> Tensor:
        """Features of N paths, (N, m) or (N, P, m). Raises KeyError for an image that is lost."""
        return self.views[framing][[self.row[path] for path in paths]]

    def counts(self) -> dict[str, int]:
        """How many images were lost, by cause."""
        return lost_counts(self.lost)


def lost_counts(lost: Sequence[tuple[str, Place]]) -> dict[str, int]:
    """How many images were lost, by cause; lost: as in Encoded."""
    return {"images missing": 0, "images broken": 0} | Counter(f"images {cause}" for cause, _ in lost)


class Files(Dataset[Any]):
    """Images transformed for a vision tower, (3, H, W) uint8 each; for a lost one the cause, 'missing' or 'broken'."""

    def __init__(self, paths: Sequence[Place], transform: Transform) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor | str:
        place = self.paths[number]
        try:
            data = file_bytes(file_at(place))
            return _of_region(data, place, self.transform) if isinstance(place, Region) else read_image(data, self.transform)
        except BrokenSample as error:
            return "missing" if str(error).startswith("missing") else "broken"


def _of_region(data: bytes, region: Region, transform: Transform) -> Tensor:
    try:
        return transform(region.cut(decode_image(data)))
    except ValueError as error:
        raise BrokenSample(str(error)) from None


def encode_files(
    model: VisualPrefixLM, paths: Sequence[Place], options: Encoding, framings: Sequence[Framing] = ("own",)
) -> Encoded:
    """Encode each distinct image once in each framing; one that is lost in any has no features.

    Raises UserError where more than options.max_lost are missing or broken.
    """
    distinct = list(dict.fromkeys(paths))
    batches = [distinct[start : start + options.batch_size] for start in range(0, len(distinct), options.batch_size)]
    views = {framing: [torch.empty(0, *model.vision.shape, device=model.device)] for framing in framings}
    good: list[Place] = []
    lost: list[tuple[str, Place]] = []
    encoded = encode_batches(model, batches, options, framings)
    for batch in tqdm(encoded, "encoding images", len(batches), unit="batch", leave=False):
        good += batch.row
        lost += batch.lost
        for framing in framings:
            views[framing].append(batch.views[framing].float())  # (b, m) or (b, P, m)
    whole = {framing: torch.cat(rows) for framing, rows in views.items()}  # (n, m) or (n, P, m)
    return Encoded(whole, {path: i for i, path in enumerate(good)}, lost)


@torch.no_grad()
def encode_batches(
    model: VisualPrefixLM,
    batches: Sequence[Sequence[Place]],
    options: Encoding,
    framings: Sequence[Framing] = ("own",),
    whole: int | None = None,
) -> Iterator[Encoded]:
    """Batches of image files, each encoded in one pass when it is asked for, in the tower's dtype; a batch may be empty.

    whole: images of which these are a part; None: these are all. Raises UserError as soon as more than options.max_lost of
    the whole are missing or broken.
    """
    paths = [path for batch in batches for path in batch]
    whole = whole or len(paths)
    check_lost([("missing", path) for path in paths if not file_at(path).is_file()], whole, options.max_lost)
    vision, numbers = model.vision, iter(range(len(paths)))
    files = Files(paths, Several([framed_as(vision.transform, how, vision.image_size) for how in framings]))
    sampler = [list(islice(numbers, len(batch))) for batch in batches]
    loader = WorkerLoader(files, batch_sampler=sampler, num_workers=options.workers, collate_fn=list)
    lost: list[tuple[str, Place]] = []
    for batch, found in zip(batches, loader, strict=True):
        some = list(zip(batch, found, strict=True))
        here = [(cause, path) for path, cause in some if isinstance(cause, str)]
        lost += here
        check_lost(lost, whole, options.max_lost)
        good = {path: pixels for path, pixels in some if isinstance(pixels, Tensor)}
        framed = torch.stack([*good.values()], 1) if good else [torch.empty(0)] * len(framings)  # (V, b, 3, H, W)
        none = torch.empty(0, *vision.shape, device=model.device)
        views = {how: vision(pixels) if good else none for how, pixels in zip(framings, framed, strict=True)}  # (b, ..., m)
        yield Encoded(views, {path: i for i, path in enumerate(good)}, here)


def check_lost(lost: Sequence[tuple[str, Place]], count: int, max_lost: float) -> None:
    """Raise UserError where more than the share max_lost of `count` images is lost, or all of them."""
    if lost and (len(lost) > max_lost * count or len(lost) == count):
        some = first_few([f"{path} ({cause})" for cause, path in lost])
        much = "all" if len(lost) == count else f"more than {max_lost:.0%}"
        raise UserError(
            f"{len(lost)} of {count} images cannot be had, {much}: {some}"
            f"; name their folder, or allow more by --max-lost (data.max_lost in training)"
        )
