"""The contract of a vision tower, v(x) in R^m, and of its text tower.

    NAME, local-dir:FOLDER, hf-hub:ORG/NAME, toy      open_clip
    timm:NAME, timm:NAME@FILE, timm:local-dir:FOLDER  timm
    hf:FOLDER, hf:ORG/NAME                            transformers: CLIP, SigLIP, DINOv2, DINOv3, ViT, ConvNeXt and others

A new kind of tower is a subclass with `encode` and `load`, about 20 lines (example: fromage.models.vision.timm), plus one
line in fromage.models.vision.registry. Three methods are for those that have more: `load_patches` for Octopus, `text_tower`
for the CLIP baseline, `check` for names that are wrong from the start.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fromage.errors import UserError
from fromage.images.transforms import JpegDecoding, decoding_as, halves
from fromage.models.cpu_linear import cpu_linears
from fromage.models.frozen import FrozenTower, digest_of_samples


class TextTower(ABC):
    """The text side of a contrastive pair such as CLIP; the baseline of retrieval compares images and texts with it.

    e is the width of the space that images and texts share.

    Attributes:
        project: features of the vision tower (N, m) -> (N, e), not normalised.
    """

    project: nn.Module

    @torch.no_grad()
    def embed_features(self, features: Tensor) -> Tensor:
        """(N, m) features of the vision tower -> (N, e) unit rows."""
        return F.normalize(self.project(features.float()), dim=-1)  # (N, m) -> (N, e)

    @abstractmethod
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, e) unit rows."""


class VisionTower(FrozenTower, ABC):
    """A frozen vision tower: images -> features, pooled (m,) or at P patches (P, m).

    Attributes:
        visual: the module that `encode` runs.
        transform: PIL image -> (3, H, W) uint8, the tower's own resize and crop; normalisation is part of the forward. A
            transform that is not in two halves (fromage.images.transforms.halves) gives (3, H, W) normalised.
        image_size: (H, W) of the input of `encode`, in pixels.
        shape: shape of the features of one image: (m,), or (P, m) for patches.
        width: m.
        grid: rows and columns of patches, P = rows x columns; None for pooled features.
        projection: the layers of a CLIP after pooling, features (N, m) -> (N, e) of the space that images and texts share,
            not normalised; it belongs to no module. None for a tower without text tower.
    """

    visual: Any
    projection: nn.Module | None = None

    def __init__(self, visual: nn.Module, transform: Any, name: str, image_size: int | Sequence[int]) -> None:
        """transform: PIL image -> (3, H, W); ToTensor and Normalize at its end become part of forward (see halves)."""
        super().__init__()
        self.visual, self.name = visual, name
        self.transform, self.normalise = halves(transform)
        self.freeze()
        if sum(isinstance(module, nn.Conv2d) for module in visual.modules()) > 1:
            visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster for convolutional models
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size: tuple[int, int] = (height, width)
        parameter = next(self.visual.parameters())
        with torch.no_grad():
            probe = torch.zeros(1, 3, height, width, dtype=parameter.dtype, device=parameter.device)
            found = self.encode(probe)  # (1, m), or (1, m, rows, columns)
        self.grid: tuple[int, int] | None = (found.shape[2], found.shape[3]) if found.ndim == 4 else None
        self.shape = _in_rows(found).shape[1:]
        self.width: int = self.shape[-1]

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, m) features, or (B, m, rows, columns) at patches."""

    @classmethod
    @abstractmethod
    def load(cls, name: str, weights: str | None, dtype: str, random_weights: bool) -> VisionTower:
        """The tower of a name, as in a configuration. Raises UserError for unknown names and for missing weights."""

    @classmethod
    def check(cls, name: str, weights: str | None) -> None:
        """Raise UserError for names and weights that `load` would refuse, as far as this is known without loading."""

    @classmethod
    def load_patches(cls, name: str, weights: str | None, layer: int, dtype: str, random_weights: bool) -> VisionTower:
        """The tower read at the patches of a layer, shape (P, m): the whole image, pressed into the tower's square.

        Raises UserError for towers without patches, and IndexError for a layer that is not there.
        """
        raise UserError(f"vision tower {name}: gives no patches; choose a ViT or a convolutional tower")

    def text_tower(self) -> TextTower | None:
        """The text tower trained with this vision tower, or None if there is none."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the frozen weights."""
        return next(self.visual.parameters()).dtype

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels, uint8 or normalised -> (B, *shape) features, without gradient."""
        parameter = next(self.visual.parameters())
        pixels = pixels.to(parameter.device, non_blocking=True)
        if pixels.dtype == torch.uint8 and self.normalise:
            pixels = self.normalise(pixels)
        with cpu_linears():
            features = _in_rows(self.encode(pixels.to(parameter.dtype)))  # (B, *shape)
        return features.contiguous()  # a ViT returns a view, which would keep all its tokens in memory

    def fingerprint(self, decoding: JpegDecoding = "draft") -> dict[str, str]:
        """The identity of stored features: the tower's name, its weights (a digest of samples) and the preprocessing."""
        shown = re.sub(r" at 0x[0-9a-f]+|\s+", " ", str(decoding_as(self.transform, decoding)))
        return {"tower": self.name, "weights": digest_of_samples(self.visual), "preprocessing": shown}


def _in_rows(found: Tensor) -> Tensor:
    """(B, m, rows, columns) at patches -> (B, P, m), each patch at mean 0 and variance 1; others as they are."""
    if found.ndim != 4:
        return found
    rows = found.flatten(2).transpose(1, 2)  # (B, P, m)
    return F.layer_norm(rows.float(), rows.shape[-1:]).to(found.dtype)  # (B, P, m)


@contextmanager
def quiet() -> Iterator[None]:
    """Within, the towers' libraries do not log what they leave out or find odd; their errors are told as UserError."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
