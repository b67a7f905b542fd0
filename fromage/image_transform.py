"""Preprocessing in two halves: resize and crop where pictures are read, in bytes; normalisation where the tower runs.

A byte for a number of four: workers hand over, and the device is sent, a quarter of what normalised pictures take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import normalize, pil_to_tensor


class Resize:
    """An open_clip transform up to its conversion to floats: picture -> (3, H, W) uint8."""

    def __init__(self, whole: Any, steps: list[Callable[[Any], Any]]) -> None:
        self.whole, self.steps = whole, steps

    def __call__(self, picture: Image.Image) -> Tensor:
        """The very bytes that open_clip's transform goes on with."""
        for step in self.steps:
            picture = step(picture)
        return pil_to_tensor(picture)

    def __repr__(self) -> str:
        return repr(self.whole)  # stored features depend on all of it


class Normalise:
    """The other half: (B, 3, H, W) uint8 -> float32, on the device where they are."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean, self.std = mean, std

    def __call__(self, pixels: Tensor) -> Tensor:
        """(x / 255 - mean) / std of each channel: the same numbers as open_clip's transform, to the bit on a CPU."""
        return normalize(pixels.to(torch.float32).div_(255), self.mean, self.std, inplace=True)


def halves(transform: Any) -> tuple[Any, Normalise | None]:
    """Split a transform that ends, as open_clip's do, in ToTensor and Normalize; any other is left whole."""
    parts: Any = getattr(transform, "transforms", (None, None))
    *steps, convert, last = parts
    if type(convert).__name__ not in ("ToTensor", "MaybeToTensor") or type(last).__name__ != "Normalize":
        return transform, None
    return Resize(transform, steps), Normalise(list(last.mean), list(last.std))
