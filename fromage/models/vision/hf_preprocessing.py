"""Image processors of transformers as transforms: scaling, cutting and normalising where that is all they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.image_utils import SizeDict

from fromage.errors import UserError, first_line
from fromage.images.transforms import halves, scaling
from fromage.models.vision.hf_loading import folder_of

PROBES = ((97, 61), (61, 97), (83, 83))  # (width, height) of images on which a processor is tried


def preprocessing(name: str, visual: Any, squash: bool = False) -> tuple[Any, tuple[int, int]]:
    """What an image processor does, as a transform in two halves, and (H, W) of its images.

    squash: press the whole image into that size. A processor that does more than scaling, cutting and normalising is used as
    it is. On the meta device the transform is None. Raises UserError for a folder without a processor, and for one whose
    images have no fixed size.
    """
    config, on_meta = visual.config, next(visual.parameters()).device.type == "meta"
    try:
        processor = AutoImageProcessor.from_pretrained(folder_of(name), trust_remote_code=False)
    except Exception as error:
        if on_meta and isinstance(getattr(config, "image_size", None), int):
            return None, (config.image_size, config.image_size)
        raise UserError(
            f"vision tower {name}: no preprocessor_config.json that transformers can use; add its own"
        ) from error
    exact, images = Exact(processor), [*(_probe(*size) for size in PROBES), *map(_plain, ("black", "white", "teal"))]
    try:
        wanted = [exact(image) for image in images]
    except Exception as error:
        raise UserError(f"vision tower {name}: its image processor fails ({first_line(error)}); name another") from error
    if any(pixels.ndim != 3 or pixels.shape != wanted[0].shape for pixels in wanted):
        raise UserError(f"vision tower {name}: its image processor has no fixed size of images; name a tower with one")
    size = wanted[0].shape[1], wanted[0].shape[2]
    if on_meta:
        return None, size
    first = len(PROBES) if squash else 0  # pressing changes nothing where an image has one colour
    ours = _as_scaling(processor, size, squash)
    if ours and _same(ours, images[first:], wanted[first:]):
        return ours, size
    if squash:
        raise UserError(f"vision tower {name}: its image processor does more than scaling and normalising; name another")
    return exact, size


def _same(transform: Any, images: Sequence[Image.Image], wanted: Sequence[Tensor]) -> bool:
    """Whether a transform gives these normalised pixels, (3, H, W) each, up to two levels of 255, for rounding."""
    ours, normalise = halves(transform)
    if normalise is None:
        return False
    level = 255 * torch.tensor(normalise.std).view(3, 1, 1)
    pairs = zip(images, wanted, strict=True)
    return all(((normalise(ours(image)[None])[0] - pixels) * level).abs().max() < 2.01 for image, pixels in pairs)


class Exact:
    """An image processor as it is: PIL image -> (3, H, W) normalised."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        """Of an image that is decoded."""
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    def __repr__(self) -> str:
        return " ".join(f"{type(self.processor).__name__} {self.processor.to_dict()}".split())


def _as_scaling(p: Any, size: tuple[int, int], squash: bool) -> Any:
    """The transform of a processor's settings, or None; (f x - mean) / std is (x / 255 - mean / c) / (std / c)."""
    try:
        c = 255 * p.rescale_factor if p.do_rescale else 255.0
        mean, std = (p.image_mean, p.image_std) if p.do_normalize else ([0.0] * 3, [1.0] * 3)
        values = [x / c for x in mean], [x / c for x in std]
        filter_ = Image.Resampling(p.resample).name.lower()
    except (AttributeError, TypeError, ValueError):
        return None
    asked = getattr(p, "size", None) or SizeDict()
    crop: Sequence[int] | None = size if getattr(p, "do_center_crop", None) else None
    scaled: int | Sequence[int] = asked.shortest_edge or (asked.height or size[0], asked.width or size[1])
    if isinstance(scaled, int) and (portion := getattr(p, "crop_pct", None)):
        # ConvNeXt's: below 384 pixels scaled larger and cut, else pressed into the square
        scaled, crop = (int(scaled / portion), size) if scaled < 384 else (size, None)
    return scaling(size, None, filter_, *values) if squash else scaling(scaled, crop, filter_, *values)


def _probe(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([3 * x, 5 * y, x + 2 * y], 2).astype(np.uint8))


def _plain(colour: str) -> Image.Image:
    return Image.new("RGB", (50, 50), colour)
