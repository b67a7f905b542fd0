"""Objects as annotations of COCO's instances.json, with their masks: polygons, or run lengths for what has a hole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from fromage.octopus.segments import run_lengths
from fromage.toy.scenes import PIXELS, SHAPES, Mark, Polygon, Thing


def categories() -> list[dict[str, Any]]:
    """The categories of instances.json: the shapes."""
    return [{"id": n, "name": shape, "supercategory": "shape"} for n, shape in enumerate(SHAPES, 1)]


def category(thing: Thing) -> int:
    """The id of an object's category."""
    return SHAPES.index(thing.shape) + 1


def instance(number: int, image_id: int, thing: Thing, mark: Mark) -> dict[str, Any]:
    """An annotation of instances.json. area: of the mask, in square pixels, as in COCO."""
    area = round(_area(mark.outline[0]) - sum(map(_area, mark.outline[1:])), 2)
    entry = {"id": number, "image_id": image_id, "category_id": category(thing)}
    return entry | {"bbox": mark.box, "area": area, "iscrowd": 0, "segmentation": segmentation(mark.outline)}


def segmentation(outline: Sequence[Polygon]) -> list[list[float]] | dict[str, list[int]]:
    """A list of one polygon (x1, y1, x2, y2 ... in pixels); run lengths, not compressed, where there are holes."""
    if len(outline) == 1:
        return [[round(side, 2) for point in outline[0] for side in point]]
    mask = Image.new("L", (PIXELS, PIXELS))
    canvas = ImageDraw.Draw(mask)
    for place, polygon in enumerate(outline):
        canvas.polygon(polygon, fill=int(place == 0))
    return run_lengths(np.asarray(mask, bool))


def _area(polygon: Polygon) -> float:
    """By the shoelace formula."""
    return abs(sum(x * v - u * y for (x, y), (u, v) in zip(polygon, polygon[1:] + polygon[:1], strict=True))) / 2
