"""Preprocessing in two halves: resize and crop where images are read, in bytes; normalisation where the tower runs.

A byte for a number of four: workers hand over, and the device is sent, a quarter of what normalised images take.

The first half is quicker than open_clip's own. JPEGs are decoded by simplejpeg, bit for bit as by Pillow; where it objects,
Pillow has its say. The resize is torch's, Pillow's weights in a quarter of its time: four results in a thousand differ, by
one level of 255 (at most two, where an image is enlarged). And a large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size,
which is called a draft: see SPARE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from simplejpeg import decode_jpeg, decode_jpeg_header
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, ToTensor
from torchvision.transforms import Resize as Scale
from torchvision.transforms.functional import pil_to_tensor

from fromage.errors import BrokenSample, reason
from fromage.images.codec import decode_image, is_upright, opened, take_in

Transform = Callable[[Image.Image], Tensor]
JpegDecoding = Literal["draft", "exact"]
Framing = Literal["own", "square"]  # a tower's own resize and crop, or Squash in place of them

SPARE = 2
"""How many times what it is resized to a draft measures at least, either way.

The decoder then leaves out frequencies that the antialiased resize would have taken out nearly whole. Between 2 and 3 times,
COCO photographs differ by 0.45 to 0.8 levels of 255 in the mean, under half of what a bilinear filter for the bicubic one
changes; between 1 and 1.5 times it would be two levels (tests/images/test_transforms.py).
"""


@dataclass(frozen=True)
class Frame:
    """The geometry of a tower's own transform: scale, then cut out the middle.

    Attributes:
        size: of the shorter side, or (height, width) for both.
        crop: (height, width) of the middle, or None for all of it.
        filter: bicubic or bilinear.
        floored: where the middle begins if what is left over is odd: at the lower number, or at the even one.
    """

    size: int | tuple[int, int]
    crop: tuple[int, int] | None
    filter: str
    floored: bool = False

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that an image is scaled to; torchvision's arithmetic."""
        if not isinstance(self.size, int):
            return self.size[1], self.size[0]
        if width <= height:
            return self.size, int(self.size * height / width)
        return int(self.size * width / height), self.size

    def draft(self, width: int, height: int) -> int:
        """By how much a JPEG may be divided as it is decoded: 1, 2, 4 or 8."""
        to_width, to_height = self.resized(width, height)
        spare = min(width / to_width, height / to_height) / SPARE
        return max(scale for scale in (1, 2, 4, 8) if scale <= max(1, spare))

    def __call__(self, pixels: Tensor, whole: tuple[int, int], scale: int = 1) -> Tensor:
        """Pixels (c, h, w) uint8 of an image -> (3, H, W) uint8.

        whole: (width, height) of the image, of which the pixels are 1 / scale: where that leaves a rest, the last column
        and row stand for fewer of its own.
        """
        to_width, to_height = self.resized(*whole)
        factors = (scale * to_height / whole[1] * (1 + 1e-9), scale * to_width / whole[0] * (1 + 1e-9))  # floored within
        rows = interpolate(pixels.unsqueeze(0), scale_factor=factors, mode=self.filter, antialias=True)[0, :3]  # (3, h', w')
        height, width = self.crop or (to_height, to_width)
        first = int if self.floored else round
        top, left = first((to_height - height) / 2), first((to_width - width) / 2)
        return rows[:, top : top + height, left : left + width]  # batches copy it anyway


class FlooredCrop(CenterCrop):
    """The middle as image processors of transformers cut it out: an odd rest has its smaller half in front."""

    def forward(self, img: Image.Image) -> Image.Image:
        """What the image lacks is black."""
        height, width = self.size
        left, top = int((img.width - width) / 2), int((img.height - height) / 2)
        return img.crop((left, top, left + width, top + height))


class Resize:
    """A tower's own transform up to its conversion to floats: image -> (3, H, W) uint8."""

    def __init__(self, whole: Any, steps: list[Any], decoding: JpegDecoding = "draft") -> None:
        self.whole, self.steps, self.decoding, self.frame = whole, steps, decoding, _frame(steps)

    def __call__(self, image: Image.Image) -> Tensor:
        """Of an image that is decoded."""
        if self.frame:
            return self.frame(pil_to_tensor(image.convert("RGB")), image.size)
        for step in self.steps:
            image = step(image)
        return pil_to_tensor(image)

    def read(self, data: bytes) -> Tensor:
        """Of a file's bytes. Raises BrokenSample as decode_image does."""
        image = opened(data)
        if self.frame and image.format == "JPEG" and image.mode in ("RGB", "L") and is_upright(image):
            scale = self.frame.draft(*image.size) if self.decoding == "draft" else 1
            pixels = jpeg_pixels(data, image.size, scale)
            if pixels is not None:
                return self.frame(pixels, image.size, scale)
        return self(take_in(image))

    def __repr__(self) -> str:
        how = f", by torch, JPEGs {self.decoding}" if self.frame else ""
        return f"{self.whole!r}{how}"  # stored features depend on all of it


class Squash:
    """The whole image pressed into the tower's square, whatever its shape -> (3, H, W) uint8, as the released evaluations.

    Pillow's own numbers: Image.resize, bicubic but for palettes, then RGB. EXIF turns nothing, and transparency is dropped.
    """

    def __init__(self, size: tuple[int, int], then: Transform | None) -> None:
        """size: (H, W). then: what follows where the tower's transform is not in halves; None for nothing."""
        self.size, self.then = size, then

    def __call__(self, image: Image.Image) -> Tensor:
        """Of an opened image."""
        square = image.resize(self.size[::-1]).convert("RGB")
        return self.then(square) if self.then else pil_to_tensor(square)

    def read(self, data: bytes) -> Tensor:
        """Of a file's bytes. Raises BrokenSample as decode_image does."""
        image = opened(data)
        try:
            return self(image)
        except Exception as error:  # on broken bytes Pillow raises nearly anything
            raise BrokenSample(f"undecodable image: {reason(error)}") from None

    def __repr__(self) -> str:
        return f"pressed into {self.size} by Pillow" + (f", then {self.then!r}" if self.then else "")


class Several:
    """V transforms of the same image, whose results are of one shape -> (V, 3, H, W)."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = transforms

    def __call__(self, image: Image.Image) -> Tensor:
        """Of an image that is decoded."""
        return torch.stack([transform(image) for transform in self.transforms])  # (V, 3, H, W)

    def read(self, data: bytes) -> Tensor:
        """Of a file's bytes, by each in its own way. Raises BrokenSample as decode_image does."""
        return torch.stack([read_image(data, transform) for transform in self.transforms])  # (V, 3, H, W)


class Normalise:
    """The other half: (B, 3, H, W) uint8 -> float32, on the device where they are."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean, self.std = mean, std
        self._there: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        """(x / 255 - mean) / std of each channel: the same numbers as open_clip's transform, to the bit on a CPU.

        torchvision's copies both to the device each time, and waits for it.
        """
        if pixels.device not in self._there:
            made = (
                torch.tensor([*map(float, each)], dtype=torch.float32, device=pixels.device).view(3, 1, 1)
                for each in (self.mean, self.std)
            )
            self._there[pixels.device] = tuple(made)  # type: ignore[assignment]
        mean, std = self._there[pixels.device]
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


def scaling(
    size: int | Sequence[int],
    crop: Sequence[int] | None,
    filter_: str,
    mean: Iterable[float],
    std: Iterable[float],
) -> Compose:
    """A transform that `halves` splits: scale, cut out the middle, normalise. size, crop: as of Frame."""
    scale = Scale(size, InterpolationMode(filter_))
    return Compose([scale, *([FlooredCrop(list(crop))] if crop else []), ToTensor(), Normalize(list(mean), list(std))])


def halves(transform: Any) -> tuple[Any, Normalise | None]:
    """Split a transform that ends, as open_clip's do, in ToTensor and Normalize; any other is left whole."""
    parts: Any = getattr(transform, "transforms", (None, None))
    *steps, convert, last = parts
    if type(convert).__name__ not in ("ToTensor", "MaybeToTensor") or type(last).__name__ != "Normalize":
        return transform, None
    return Resize(transform, steps), Normalise(list(last.mean), list(last.std))


def read_image(data: bytes, transform: Transform) -> Tensor:
    """A file's bytes through a transform -> (3, H, W). Raises BrokenSample as decode_image does."""
    return transform.read(data) if isinstance(transform, (Resize, Squash, Several)) else transform(decode_image(data))


def decoding_as(transform: Transform, decoding: JpegDecoding) -> Transform:
    """The transform, by which JPEGs are read as drafts where that does not show, or exactly."""
    return Resize(transform.whole, transform.steps, decoding) if isinstance(transform, Resize) else transform


def framed_as(transform: Transform, framing: Framing, size: tuple[int, int]) -> Transform:
    """The transform of a tower whose input is of size (H, W), with that framing in place of its own."""
    if framing == "own":
        return transform
    return Squash(size, None if isinstance(transform, Resize) else transform)


def jpeg_pixels(data: bytes, size: tuple[int, int], scale: int) -> Tensor | None:
    """A JPEG of (width, height) at 1 / scale -> (4, h, w) uint8, the fourth channel of no meaning; None if it is damaged."""
    width, height = size
    least = {"min_height": -(-height // scale), "min_width": -(-width // scale), "min_factor": scale}
    try:
        if decode_jpeg_header(data)[:2] != (height, width):
            return None
        return torch.from_numpy(decode_jpeg(data, "RGBX", **least)).permute(2, 0, 1)
    except ValueError:
        return None


def _frame(steps: list[Any]) -> Frame | None:
    """What the steps do, or None where it is not a plain scaling and cutting."""
    first, *rest = [step for step in steps if type(step).__name__ != "MaybeConvertMode"]
    crop = next((tuple(step.size) for step in rest if isinstance(step, CenterCrop)), None)
    if type(first).__name__ != "Resize" or len(rest) > (crop is not None):
        return None
    size, filter_ = first.size if isinstance(first.size, int) else tuple(first.size), first.interpolation.value
    if crop == size:  # nothing is cut off
        crop = None
    fits = crop is None or (isinstance(size, int) and max(crop) <= size)  # else the crop would have to fill up
    known = fits and first.max_size is None and filter_ in ("bicubic", "bilinear")
    return Frame(size, crop, filter_, any(isinstance(step, FlooredCrop) for step in rest)) if known else None


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) pixels, uint8 or normalised (then stretched to the full range) -> an image to look at."""
    if pixels.dtype != torch.uint8:
        low, high = pixels.float().aminmax()
        pixels = ((pixels.float() - low) / (high - low).clamp_min(1e-6) * 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)
