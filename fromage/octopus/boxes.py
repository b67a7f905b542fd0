"""Boxes: from pixels to relative coordinates, in reading order, and as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isfinite

from fromage.octopus.examples import Box

NUMBER = r"\s*-?\d+\.\d+\s*"  # with a decimal point: a list of integers is no box
SPELLED = re.compile(rf"\[{NUMBER}(?:,{NUMBER}){{3}}(?:;{NUMBER}(?:,{NUMBER}){{3}})*\]")  # Shikra joins several by ';'


def relative(left: float, top: float, right: float, bottom: float, width: float, height: float) -> Box | None:
    """A box in pixels of an image of width x height -> relative coordinates, clipped to it; None if without area."""
    if not all(isfinite(value) for value in (left, top, right, bottom)):
        return None
    return clipped(left / width, top / height, right / width, bottom / height)


def clipped(left: float, top: float, right: float, bottom: float) -> Box | None:
    """A box in relative coordinates, clipped to the image; None if it has no area."""
    left, top, right, bottom = (min(1.0, max(0.0, value)) for value in (left, top, right, bottom))
    return (left, top, right, bottom) if left < right and top < bottom else None


def reading_order(boxes: Sequence[Box]) -> list[int]:
    """The numbers of the boxes in reading order: by thirds of the image from left to right, in a third from top to bottom.

    The third is that of the box's centre. Exact x positions would order the boxes of a column by chance.
    """

    def place(number: int) -> tuple[int, float, float]:
        left, top, right, bottom = boxes[number]
        return min(2, int(3 * (left + right) / 2)), top + bottom, left

    return sorted(range(len(boxes)), key=place)


def spelled(box: Box) -> str:
    """A box in Shikra's format: '[0.123,0.456,0.789,0.912]'."""
    return f"[{','.join(f'{value:.3f}' for value in box)}]"


def read_spelled(text: str) -> list[tuple[float, ...]]:
    """The four numbers of each box in a bracket that SPELLED found: one box or, joined by ';', several."""
    return [tuple(float(number) for number in part.split(",")) for part in text.strip("[]").split(";")]
