"""Boxes of COCO's instances.json, crowds left out; RefCOCO's files have the same format."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

from fromage.data.annotation_formats import read_annotations
from fromage.data.annotations import FILE, NUMBER, WHOLE, Schema, by_id, optional
from fromage.octopus.boxes import relative
from fromage.octopus.examples import Box
from fromage.octopus.sources.file_source import HELD_OUT, SIDE, FileSource

IMAGE: Schema = {"id": WHOLE, "file_name": FILE, "width": SIDE, "height": SIDE}
INSTANCE: Schema = {"id": WHOLE, "image_id": WHOLE, "bbox": (NUMBER,) * 4, "iscrowd": optional(WHOLE)}


class AnnotatedImage(NamedTuple):
    """An image of instances.json.

    Attributes:
        path: of its file.
        boxes: those with an area, crowds left out.
        numbers: annotation id -> the number of its box; None for a crowd, and where the box has no area.
        size: width and height in pixels.
        segments: annotation id -> its segmentation, unchecked.
    """

    path: str
    boxes: tuple[Box, ...]
    numbers: dict[int, int | None]
    size: tuple[float, float]
    segments: dict[int, Any]


class Instances(FileSource):
    """Base class of the readers of an instances.json."""

    def __init__(self, file: Path, instances: str, images: str, limit: int | None) -> None:
        super().__init__(file, limit)
        self.instances, self.images = Path(instances), Path(images)

    def content(self) -> dict[str, Any]:
        """What the file holds. Raises UserError where it is missing, or something else."""
        return read_annotations(self.instances, ("boxes of COCO",), "instances.json of COCO or of the same data set")[1]  # type: ignore[no-any-return]

    def annotated(
        self, content: dict[str, Any], wanted: Container[int] | None = None, held_out: Container[int] = ()
    ) -> dict[int, AnnotatedImage]:
        """The images by their id, in stored order: the wanted ones (None: all) without those that are held out."""
        listed = self.fitting(self.instances, "images", content.get("images"), IMAGE)
        chosen = [image for key, image in by_id(self.instances, "images", listed).items() if wanted is None or key in wanted]
        images = [image for image in chosen if image["id"] not in held_out]
        self.drop(HELD_OUT, len(chosen) - len(images))
        notes: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
        for note in self.fitting(self.instances, "annotations", content["annotations"], INSTANCE):
            if note["image_id"] in notes:
                notes[note["image_id"]].append(note)
        return {image["id"]: self._annotated(image, notes[image["id"]]) for image in images}

    def _annotated(self, image: dict[str, Any], notes: list[dict[str, Any]]) -> AnnotatedImage:
        single = [note for note in notes if not note.get("iscrowd")]
        self.drop("boxes of crowds", len(notes) - len(single))
        corners = [(x, y, x + w, y + h) for x, y, w, h in (note["bbox"] for note in single)]
        good, numbers = self.kept(relative(*sides, image["width"], image["height"]) for sides in corners)
        found = {note["id"]: number for note, number in zip(single, numbers, strict=True)}
        found |= {note["id"]: None for note in notes if note.get("iscrowd")}
        segments = {note["id"]: note.get("segmentation") for note in single}
        size = image["width"], image["height"]
        return AnnotatedImage(str(self.images / image["file_name"]), tuple(good), found, size, segments)
