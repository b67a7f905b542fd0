"""The image of a stored sample: pixels of its file or, where they are stored, its features.

KEY.npy holds the features; where it is there, the image's file is not read. A tuple
(fromage.data.tuples) has a second image.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fromage.data.shards import Raw, image_file
from fromage.errors import BrokenSample, UserError
from fromage.images.transforms import Transform, read_image

TARGET_IMAGE = "target."  # in front of an extension: of a tuple's second image


class Images(NamedTuple):
    """n images, or their features; the other is None. Of a single one, as read_images gives it, without n."""

    pixels: Tensor | None  # (n, 3, H, W), as of Batch
    features: Tensor | None  # (n, m)


def read_images(raw: Raw, transform: Transform, width: int | None = None) -> Images:
    """The image of a stored sample: features (m,) where they are stored, else pixels (3, H, W) by the transform.

    width: m, where that is known. Raises BrokenSample as from_npy, image_file and read_image do.
    """
    if "npy" in raw:
        return Images(None, from_npy(raw["npy"], width))
    return Images(read_image(image_file(raw), transform), None)


@dataclass
class ImageReader:
    """Reads the images of stored samples, by read_images; all stored features must be of one width.

    Attributes:
        width: m of the features; None until the first ones are read, whose width it then is.
    """

    transform: Transform
    width: int | None = None

    def __call__(self, raw: Raw) -> Images:
        """The image of one sample, as of read_images. Raises BrokenSample for features of another width too."""
        image = read_images(raw, self.transform, self.width)
        if image.features is not None:
            self.width = len(image.features)
        return image


def stacked(images: Sequence[Images], near: str, what: str) -> Images:
    """Images of n samples -> of a batch: (n, 3, H, W) or (n, m).

    Raises UserError where some have features and others not; near: key of a sample, what: of samples or shards, for the
    message.
    """
    columns = [[x for x in column if x is not None] for column in zip(*images, strict=True)]
    if all(columns):
        raise UserError(f"some {what} hold features, others only images (near {near}): name shards of one kind")
    return Images(*(torch.stack(column) if column else None for column in columns))  # (n, 3, H, W), (n, m)


def target_image(raw: Raw) -> Raw:
    """The members of a tuple's target image, as those of an image; empty where there is none."""
    return {kind.removeprefix(TARGET_IMAGE): data for kind, data in raw.items() if kind.startswith(TARGET_IMAGE)}


def to_npy(features: Tensor) -> bytes:
    """Features (m,) as a .npy file, value for value. NumPy has no bfloat16: its 16 bits are stored as uint16."""
    bits = features.detach().cpu().contiguous()
    buffer = io.BytesIO()
    np.save(buffer, (bits.view(torch.uint16) if bits.dtype == torch.bfloat16 else bits).numpy(), allow_pickle=False)
    return buffer.getvalue()


def from_npy(data: bytes, width: int | None = None) -> Tensor:
    """What to_npy stored: (m,). Raises BrokenSample for anything else; width: m, where that is known.

    NumPy would allocate what the header claims, and a damaged header raises nearly anything.
    """
    try:
        file = io.BytesIO(data)
        if np.lib.format.read_magic(file) != (1, 0):
            raise BrokenSample("unreadable features: no .npy as they are stored")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if len(shape) != 1 or dtype.hasobject:
            raise BrokenSample(f"features are not a finite vector: {shape} {dtype}")
        bits = torch.from_numpy(np.frombuffer(data, dtype, shape[0], file.tell()).copy())
    except BrokenSample:
        raise
    except Exception:
        raise BrokenSample("unreadable features: a damaged .npy") from None
    features = bits.view(torch.bfloat16) if bits.dtype == torch.uint16 else bits
    if not features.is_floating_point() or not features.isfinite().all():
        raise BrokenSample(f"features are not a finite vector: {tuple(features.shape)} {features.dtype}")
    if width is not None and len(features) != width:
        raise BrokenSample(f"features of another width: {len(features)}, not {width}")
    return features
