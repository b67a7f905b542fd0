"""The toy world's images of several objects as Visual Genome: regions with descriptions, and objects with names."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fromage.toy.expressions import meaning_of, words
from fromage.toy.scenes import PIXELS, Mark, Scene
from fromage.toy.writers import Paint, write_images, write_json

HOST = "https://example.org"
FOLDERS = ("VG_100K", "VG_100K_2")  # images are in either, as the two published archives have them
SAID = {"plain": 2, "two": 1, "relation": 1}  # how often each kind of description is tried


def write_visual_genome(out: Path, scenes: Sequence[Scene], rng: random.Random, paint: Paint) -> None:
    """visual_genome: image_data.json, region_descriptions.json, objects.json, and images in VG_100K and VG_100K_2.

    A region per object, whose description fits no other object. As published there is no split, and coco_id is null for an
    image that is not COCO's; pixels are whole numbers.
    """
    folder = out / "visual_genome"
    numbered = list(enumerate(scenes, 1))
    marks: dict[int, list[Mark]] = {}
    for half, name in enumerate(FOLDERS, 1):
        mine = [number for number, _ in numbered if (number - half) % 2 == 0]
        jobs = [(scenes[number - 1], number) for number in mine]
        marks |= zip(mine, write_images(folder / name, [f"{number}.jpg" for number in mine], jobs, paint), strict=True)
    images, regions, objects = [], [], []
    first = 1  # the number of an image's first region, and object
    for number, scene in numbered:
        url = f"{HOST}/{FOLDERS[(number - 1) % 2]}/{number}.jpg"
        image = {"image_id": number, "url": url, "width": PIXELS, "height": PIXELS, "coco_id": None, "flickr_id": None}
        images.append(image | {"scene": scene.key})
        boxes = [[round(side) for side in mark.box] for mark in marks[number]]
        regions.append({"regions": _regions(number, scene, boxes, rng, first), "id": number})
        objects.append({"image_id": number, "objects": _objects(scene, boxes, first), "image_url": url})
        first += len(boxes)
    for name, content in (("image_data", images), ("region_descriptions", regions), ("objects", objects)):
        write_json(folder / f"{name}.json", content)


def _regions(number: int, scene: Scene, boxes: list[list[int]], rng: random.Random, first: int) -> list[dict[str, Any]]:
    """Descriptions such as 'a small star left of a ring on the sand'."""
    found = []
    for index, (x, y, w, h) in enumerate(boxes):
        where = f" on the {scene.ground}" if rng.random() < 0.5 else ""
        phrase = words(meaning_of(scene, index, rng, SAID), "a") + where
        region = {"region_id": first + index, "image_id": number, "phrase": phrase}
        found.append(region | {"x": x, "y": y, "width": w, "height": h})
    return found


def _objects(scene: Scene, boxes: list[list[int]], first: int) -> list[dict[str, Any]]:
    return [
        {"object_id": number, "names": [thing.shape], "synsets": [f"{thing.shape}.n.01"], "x": x, "y": y, "w": w, "h": h}
        for number, (thing, (x, y, w, h)) in enumerate(zip(scene.things, boxes, strict=True), first)
    ]
