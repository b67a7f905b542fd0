"""Image files encoded by a vision tower: each once, in batches; images that are missing or broken are counted and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fromage.data.workers import init_worker, plain_errors
from fromage.errors import BrokenSample, UserError, first_few
from fromage.images.open import file_bytes
from fromage.images.transforms import Framing, Several, Transform, framed_as, read_image
from fromage.models.base import VisualPrefixLM

Item = TypeVar("Item")


@dataclass(frozen=True)
class Options:
    """How an evaluation runs.

    Attributes:
        batch_size: texts or images in a pass.
        workers: processes that decode images; 0 decodes in this one.
        max_lost: share of the images, 0 to 1, that may be missing or broken.
        clip: whether the frozen CLIP is evaluated as a baseline.
    """

    batch_size: int = 64
    workers: int = 0
    max_lost: float = 0.05
    clip: bool = True


@dataclass(frozen=True)
class Encoded:
    """Features of images.

    Attributes:
        views: features by framing: (n, m) pooled, or patches (n, P, m), float32 on the model's device.
        row: path of an image -> its row in each of these.
        lost: (cause, path) of the images that have none; causes are 'missing' and 'broken'.
    """

    views: dict[Framing, Tensor]
    row: dict[Path, int]
    lost: list[tuple[str, Path]]

    @property
    def features(self) -> Tensor:
        """Those of the tower's own framing."""
        return self.views["own"]

    def of(self, paths: Sequence[Path], framing: Framing = "own") -> Tensor:
        """Features of N paths, (N, m) or (N, P, m). Raises KeyError for an image that is lost."""
        return self.views[framing][[self.row[path] for path in paths]]

    def counts(self) -> dict[str, int]:
        """How many images were lost, by cause."""
        return {"images missing": 0, "images broken": 0} | Counter(f"images {cause}" for cause, _ in self.lost)


class Files(Dataset[Any]):
    """Images transformed for a vision tower, (3, H, W) uint8 each; for a lost one the cause, 'missing' or 'broken'."""

    def __init__(self, paths: list[Path], transform: Transform) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor | str:
        try:
            return read_image(file_bytes(self.paths[number]), self.transform)
        except BrokenSample as error:
            return "missing" if str(error).startswith("missing") else "broken"


@torch.no_grad()
def encode_files(
    model: VisualPrefixLM, paths: Sequence[Path], options: Options, framings: Sequence[Framing] = ("own",)
) -> Encoded:
    """Encode each distinct image once in each framing; one that is lost in any has no features.

    Raises UserError where more than options.max_lost are missing or broken.
    """
    distinct = list(dict.fromkeys(paths))
    check_lost([("missing", path) for path in distinct if not path.is_file()], len(distinct), options.max_lost)
    vision = model.vision
    files = Files(distinct, Several([framed_as(vision.transform, how, vision.image_size) for how in framings]))
    loader: Any = DataLoader(
        files, options.batch_size, num_workers=options.workers, collate_fn=list, worker_init_fn=init_worker
    )
    views = {framing: [torch.empty(0, *vision.shape, device=model.device)] for framing in framings}
    good: list[Path] = []
    lost: list[tuple[str, Path]] = []
    for batch in tqdm(plain_errors(loader), "encoding images", len(loader), unit="batch", leave=False):
        start = len(good) + len(lost)
        some = list(zip(distinct[start : start + len(batch)], batch, strict=True))
        good += [path for path, pixels in some if isinstance(pixels, Tensor)]
        lost += [(cause, path) for path, cause in some if isinstance(cause, str)]
        if pixels := [pixels for _, pixels in some if isinstance(pixels, Tensor)]:
            for rows, framed in zip(views.values(), torch.stack(pixels, 1), strict=True):  # (V, b, 3, H, W)
                rows.append(vision(framed).float())  # (b, 3, H, W) -> (b, m) or (b, P, m)
    check_lost(lost, len(distinct), options.max_lost)
    whole = {framing: torch.cat(rows) for framing, rows in views.items()}  # (n, m) or (n, P, m)
    return Encoded(whole, {path: i for i, path in enumerate(good)}, lost)


def check_lost(lost: list[tuple[str, Path]], count: int, max_lost: float) -> None:
    """Raise UserError where more than the share max_lost of `count` images is lost, or all of them."""
    if lost and (len(lost) > max_lost * count or len(lost) == count):
        some = first_few([f"{path} ({cause})" for cause, path in lost])
        much = "all" if len(lost) == count else f"more than {max_lost:.0%}"
        raise UserError(
            f"{len(lost)} of {count} images cannot be had, {much}: {some}"
            f"; name their folder, or allow more by --max-lost (data.max_lost in training)"
        )


def in_batches(embed: Callable[[Any], Tensor], items: Sequence[Item], size: int, what: str) -> Tensor:
    """(N, e) rows of N items, which embed takes `size` at a time, with a progress bar named `what`."""
    starts = tqdm(range(0, len(items), size), desc=what, unit="batch", leave=False)
    return torch.cat([embed(items[start : start + size]) for start in starts])  # (b, e) each -> (N, e)
