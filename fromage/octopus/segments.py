"""Masks of objects in COCO's formats (Lin et al., ECCV 2014): polygons and run lengths, read by pycocotools."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from fromage.data.annotations import NUMBER, WHOLE, shown
from fromage.distribution import pip_install
from fromage.errors import UserError
from fromage.images.codec import MAX_PIXELS

LONGEST = 30  # bits of a compressed run; 32 and more would be a longer run than any image has


class OddMask(ValueError):
    """What is odd about a segmentation, to stand after its name."""


class Mask(NamedTuple):
    """A mask in compressed run lengths: some hundred bytes.

    Attributes:
        size: height and width of its image in pixels.
        counts: as pycocotools writes them.
    """

    size: tuple[int, int]
    counts: bytes

    def pixels(self) -> NDArray[np.bool_]:
        """(height, width) bool."""
        return library().decode({"size": [*self.size], "counts": self.counts}).astype(bool)  # type: ignore[no-any-return]

    def coverage(self, size: tuple[int, int]) -> Tensor:
        """(H, W): the share (0 to 1) of each cell of a grid over the whole image that the mask covers."""
        return adaptive_avg_pool2d(torch.from_numpy(self.pixels()).float().unsqueeze(0), size)[0]


def library() -> Any:
    """pycocotools.mask. Raises UserError where it is not installed."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError(f"masks are read by pycocotools: {pip_install('masks')}, or leave masks out") from error
    return mask


def read_mask(segmentation: Any, width: float, height: float) -> Mask:
    """The mask of an annotation: polygons, or run lengths, compressed or not. width, height: of its image.

    Polygons of less than three points have no area and are left out. Raises OddMask for what is damaged, UserError without
    pycocotools, which must not see damaged data: it reads and writes beyond its memory.
    """
    coco = library()
    if not (WHOLE.fits(width) and WHOLE.fits(height) and width * height <= MAX_PIXELS):
        raise OddMask(f" is of an image of {shown(width)} x {shown(height)} pixels")
    w, h = int(width), int(height)
    if isinstance(segmentation, dict):
        encoded = coco.frPyObjects({"size": [h, w], "counts": _runs(segmentation, [h, w])}, h, w)
    else:
        encoded = coco.merge(coco.frPyObjects(_polygons(segmentation, w, h), h, w))
    if not coco.area(encoded):
        raise OddMask(" covers no pixel of its image")
    return Mask((h, w), bytes(encoded["counts"]))


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, list[int]]:
    """(h, w) bool -> {size, counts}: COCO's run lengths, not compressed, down the columns, of background first."""
    columns = mask.T.ravel()  # (w h,)
    ends = np.flatnonzero(np.diff(columns)) + 1
    runs = np.diff(np.concatenate([[0], ends, [columns.size]])).tolist()
    return {"size": [*mask.shape], "counts": [0] * bool(columns[:1].any()) + runs}


def _polygons(value: Any, width: int, height: int) -> list[list[float]]:
    """Those with an area; a vertex may lie outside the image, by its width or height at most."""
    if not isinstance(value, list) or not value:
        raise OddMask(f" is {shown(value)}, neither polygons nor run lengths")
    for number, polygon in enumerate(value):
        if not isinstance(polygon, list) or len(polygon) % 2 or not all(map(NUMBER.fits, polygon)):
            raise OddMask(f"[{number}] is {shown(polygon)}, not pairs of numbers")
        for place, side in enumerate(polygon):
            most = (width, height)[place % 2]
            if not -most <= side <= 2 * most:
                raise OddMask(f"[{number}][{place}] is {shown(side)}, far outside the image")
    if not (good := [polygon for polygon in value if len(polygon) >= 6]):
        raise OddMask(" has no polygon of three points")
    return good


def _runs(value: dict[str, Any], size: list[int]) -> list[int]:
    """Checked run lengths. size: height, width."""
    if value.get("size") != size:
        raise OddMask(f".size is not that of its image, {size[0]} x {size[1]} pixels (height, width)")
    counts = value.get("counts")
    runs = _decompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(WHOLE.fits(run) and run >= 0 for run in runs):
        raise OddMask(f".counts is {shown(counts)}, not run lengths")
    if sum(runs) != size[0] * size[1]:
        raise OddMask(f".counts are of {sum(runs)} pixels, not of {size[0] * size[1]}")
    return runs


def _decompressed(text: str) -> list[int]:
    """COCO's compression: characters of six bits, five of them a run's, low ones first; from the third on differences."""
    runs: list[int] = []
    run = shift = 0
    for char in text:
        bits = ord(char) - 48
        if not 0 <= bits < 64 or shift > LONGEST:
            raise OddMask(".counts is a damaged text")
        run |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last character of a run; its fifth bit is the sign
            run -= (bits >> 4 & 1) << shift
            runs.append(run + (runs[-2] if len(runs) > 2 else 0))
            run = shift = 0
    if shift:
        raise OddMask(".counts is a text that is cut off")
    return runs
