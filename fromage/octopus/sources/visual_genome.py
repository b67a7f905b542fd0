"""Visual Genome (Krishna et al., IJCV 2017): descriptions of regions, and names of objects, with their boxes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from fromage.checks import check_whole
from fromage.data.annotation_formats import read_annotations
from fromage.data.annotations import FILE, NUMBER, TEXT, WHOLE, FieldType, Schema, optional, problem
from fromage.octopus.boxes import reading_order, relative
from fromage.octopus.examples import Example
from fromage.octopus.sources.file_source import HELD_OUT, LOST_ANSWERS, SIDE, FileSource, check_question
from fromage.octopus.sources.references import held_out

REGIONS, OBJECTS = "regions of Visual Genome", "objects of Visual Genome"
ADDRESS = re.compile(r"(VG_100K(?:_2)?/[^/]+\.jpg)$")  # the end of an image's, which is its place in the unpacked archives
URL = FieldType(
    "an address that ends in VG_100K/ID.jpg or VG_100K_2/ID.jpg",
    lambda value: TEXT.fits(value) and all(map(FILE.fits, ADDRESS.findall(value) or [""])),
)
LIST = FieldType("a list", lambda value: isinstance(value, list))
IMAGE: Schema = {"image_id": WHOLE, "url": URL, "width": SIDE, "height": SIDE, "coco_id": optional(WHOLE)}
REGION: Schema = {"phrase": TEXT, **dict.fromkeys(("x", "y", "width", "height"), NUMBER)}
OBJECT: Schema = {"names": [TEXT], **dict.fromkeys(("x", "y", "w", "h"), NUMBER)}


class Parts(NamedTuple):
    """One of the two files: where an image's entries are, their format, and the names of their sides."""

    list: str
    schema: Schema
    width: str
    height: str


PARTS = {REGIONS: Parts("regions", REGION, "width", "height"), OBJECTS: Parts("objects", OBJECT, "w", "h")}


class VisualGenome(FileSource):
    """Visual Genome: one example per described region, or per name of an image's objects; known boxes are all of these."""

    def __init__(
        self,
        file: str,
        image_data: str,
        images: str,
        *,
        question: str = "where is {}?",
        per_image: int | None = None,
        apart_from: Sequence[str] = (),
        limit: int | None = None,
    ) -> None:
        """Set the files; nothing is read yet.

        Args:
            file: region_descriptions.json: one example per region. Or objects.json: one per name, whose answer points at all
                the image's objects of this name.
            image_data: image_data.json, the images' sizes.
            images: folder that holds VG_100K and VG_100K_2.
            question: the instruction; {} stands for the description or name.
            per_image: maximum number of an image's examples, the first ones; null for all, some fifty.
            apart_from: files of references, such as refs(unc).p; half of Visual Genome's images are COCO's, and those in
                splits other than train are left out.
            limit: maximum number of examples, the first ones; null for all.
        """
        super().__init__(Path(file), limit)
        if per_image is not None:
            check_whole("per_image", per_image, 1)
        self.image_data, self.images, self.question = Path(image_data), Path(images), check_question(question)
        self.per_image, self.apart_from = per_image, tuple(apart_from)

    def read(self) -> Iterator[Example]:
        """The examples, image by image."""
        kind, content = read_annotations(self.file, (*PARTS,), "region_descriptions.json or objects.json of Visual Genome")
        part, images, barred = PARTS[kind], self._images(), held_out(self.apart_from)
        for entry in self.fitting(self.file, "entries", _with_id(content), {"image_id": WHOLE, part.list: LIST}):
            image = images.get(entry["image_id"])
            if image is None:
                self.seen += 1
                self.odd.append(f"image {entry['image_id']} is not in {self.image_data}")
            elif image["coco_id"] in barred:
                self.drop(HELD_OUT)
            else:
                yield from islice(self._of_image(entry, image, part), self.per_image)

    def _images(self) -> dict[int, dict[str, Any]]:
        _, content = read_annotations(self.image_data, ("images of Visual Genome",), "image_data.json of Visual Genome")
        listed = self.fitting(self.image_data, "images", _with_id(content), IMAGE)
        return {image["image_id"]: {"coco_id": None, **image} for image in listed}

    def _of_image(self, entry: dict[str, Any], image: dict[str, Any], part: Parts) -> Iterator[Example]:
        number, width, height = image["image_id"], image["width"], image["height"]
        regions = [region for place, region in enumerate(entry[part.list]) if self._fits(number, part, place, region)]
        corners = [(r["x"], r["y"], r["x"] + r[part.width], r["y"] + r[part.height]) for r in regions]
        good, numbers = self.kept(relative(*sides, width, height) for sides in corners)
        boxes = tuple(good)  # one for all examples of the image
        path = str(self.images / ADDRESS.findall(image["url"])[0])
        for place, (text, theirs) in enumerate(self._named(regions, numbers)):
            answer = tuple(box for box in theirs if box is not None)
            if len(answer) < len(theirs):
                self.drop(LOST_ANSWERS)
            elif not text:
                self.drop("descriptions without words")
            else:
                ordered = tuple(answer[i] for i in reading_order([boxes[box] for box in answer]))
                yield Example(f"{number}.{place}", path, self.question.replace("{}", text), ordered, boxes)

    def _fits(self, number: int, part: Parts, place: int, region: Any) -> bool:
        self.seen += 1
        if odd := problem(region, part.schema):
            self.odd.append(f"{part.list}[{place}] of image {number}{odd}")
        return not odd

    @staticmethod
    def _named(regions: list[dict[str, Any]], numbers: list[int | None]) -> Iterator[tuple[str, list[int | None]]]:
        """The words of each region with its box, or each first name of the objects with the boxes of all that have it."""
        named: dict[str, list[int | None]] = {}
        for region, number in zip(regions, numbers, strict=True):
            if "phrase" in region:
                yield _words(region["phrase"]), [number]
            else:
                named.setdefault(_words("".join(region["names"][:1])), []).append(number)
        yield from named.items()


def _words(text: str) -> str:
    """A description as it can stand in a question: on one line, without a full stop."""
    return " ".join(text.split()).rstrip(" .")


def _with_id(entries: list[Any]) -> list[Any]:
    """Entries with an image_id, which some versions of the files call id."""
    return [{"image_id": entry.get("id"), **entry} if isinstance(entry, dict) else entry for entry in entries]
