"""Readers of data sets in their published files: RefCOCO/+/g, Flickr30k Entities, LLaVA's instructions, POPE.

Boxes are clipped to the image. Boxes without area are left out, and so are examples that point at them; both are counted,
and faults are warned of once. There is no reader for Visual Genome, only for its regions within LLaVA's instructions.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from math import inf, isfinite
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from xml.etree import ElementTree as ET

from PIL import Image

from fromage.checkpoints.safe_pickle import load_plain
from fromage.checks import check_whole
from fromage.data.annotations import (
    FILE,
    ID,
    NUMBER,
    TEXT,
    WHOLE,
    Kind,
    Wanted,
    fitting,
    leave_out,
    optional,
    problem,
    read_annotations,
)
from fromage.errors import BrokenSample, UserError, reason
from fromage.images.codec import FORMATS
from fromage.io import parse_json, read_text
from fromage.octopus.boxes import SPELLED, clipped, read_spelled, reading_order, share
from fromage.octopus.examples import Box, Example

LOST_BOXES = "boxes of no area in their image"
LOST_ANSWERS = "examples that point at such a box"
ODD_TURNS = "turns that are no question and answer"
ODD = "odd entries"
SIDE = Kind("a number of pixels", lambda value: NUMBER.fits(value) and value > 0)
IMAGE: Wanted = {"id": WHOLE, "file_name": FILE, "width": SIDE, "height": SIDE}  # of instances.json, as are the next two
INSTANCE: Wanted = {"id": WHOLE, "image_id": WHOLE, "bbox": (NUMBER,) * 4, "iscrowd": optional(WHOLE)}
CATEGORY: Wanted = {"id": WHOLE}
EXPRESSION: Wanted = {"sent": TEXT, "sent_id": WHOLE}
NUMBERS = dict.fromkeys(("ref_id", "image_id", "category_id", "ann_id"), WHOLE)
REFERENCE: Wanted = {**NUMBERS, "split": TEXT, "sentences": [EXPRESSION]}  # of refs(unc).p
TURNS: Wanted = {"conversations": [{"from": TEXT, "value": TEXT}]}  # of LLaVA; image and id may be anything
QUESTION: Wanted = {"question_id": ID, "image": FILE, "text": TEXT, "label": TEXT}  # of POPE
FAULTS = (LOST_BOXES, LOST_ANSWERS, ODD_TURNS)  # faults of the files, which are warned of; other omissions are intended


class Listed:
    """Base class of the readers; files are read on first use.

    Attributes:
        dropped: after reading, the number of entries left out, by kind.
    """

    def __init__(self, file: Path, limit: int | None) -> None:
        if limit is not None:
            check_whole("limit", limit, 1)
        self.file, self.limit = file, limit
        self.dropped: Counter[str] = Counter()
        self.odd: list[str] = []  # what is odd about entries that were read one by one
        self.seen = 0  # of these, and of the others

    def read(self) -> Iterator[Example]:
        """The examples of the files; entries that are left out are counted in `dropped`."""
        raise NotImplementedError

    @cached_property
    def examples(self) -> list[Example]:
        """The first `limit` examples. Raises UserError for no examples, missing files, and files of another format."""
        found = list(islice(self.read(), self.limit))
        leave_out(self.file, self.odd, self.seen)
        self._drop(ODD, len(self.odd))
        told = ", ".join(f"{count} {what}" for what, count in self.dropped.items() if count)
        if not found:
            raise UserError(f"{self.file}: holds no example{f', but {told}' if told else ''}; name another file or split")
        if any(self.dropped[what] for what in FAULTS):
            warnings.warn(f"{self.file}: left out are {told}", stacklevel=3)
        return found

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def fitting(self, path: Path, name: str, entries: Any, wanted: Wanted) -> list[Any]:
        """As fromage.data.annotations.fitting; what is left out is counted."""
        good = fitting(path, name, entries, wanted)
        self._drop(ODD, len(entries) - len(good))
        return good

    def _drop(self, what: str, count: int) -> None:
        if count:
            self.dropped[what] += count

    def kept(self, boxes: Iterable[Box | None]) -> tuple[list[Box], list[int | None]]:
        """The boxes with an area, and for each given box its number among them (None: it has no area)."""
        good: list[Box] = []
        numbers: list[int | None] = []
        for box in boxes:
            numbers.append(None if box is None else len(good))
            if box is None:
                self.dropped[LOST_BOXES] += 1
            else:
                good.append(box)
        return good, numbers


def asking(question: str) -> str:
    """The question itself. Raises UserError if it does not contain {} exactly once."""
    if question.count("{}") != 1:
        raise UserError(f"question {question!r}: must hold {{}} once, where the words for the object go")
    return question


AnnotatedImage = tuple[
    str, tuple[Box, ...], dict[int, int | None]
]  # an image, its boxes, each annotation's number among them


class RefCOCO(Listed):
    """RefCOCO, RefCOCO+ and RefCOCOg: one example per referring expression; known boxes are the image's instances."""

    def __init__(
        self,
        refs: str,
        instances: str,
        images: str,
        split: str = "train",
        question: str = "where is {}?",
        limit: int | None = None,
        match: str | None = None,
    ) -> None:
        """Set the files; nothing is read yet. Raises UserError for an invalid question or pattern.

        Args:
            refs: refs(unc).p, refs(google).p or refs(umd).p.
            instances: instances.json of the same data set.
            images: folder of the images that instances.json names, COCO's train2014.
            split: train, val and, depending on the file, testA, testB or test.
            question: the instruction; {} stands for the expression.
            limit: maximum number of examples, the first ones; null for all.
            match: regular expression; only expressions that contain it are used; null for all.
        """
        super().__init__(Path(refs), limit)
        self.instances, self.images, self.split, self.question = Path(instances), Path(images), split, asking(question)
        try:
            self.match = re.compile(match or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"match {match!r}: is no regular expression ({reason(error)}); correct it") from error

    def read(self) -> Iterator[Example]:
        """One example per sentence; its answer is the box alone."""
        refs = self._refs()
        _, content = read_annotations(self.instances, ("boxes of COCO",), "instances.json of the same data set")
        listed = self.fitting(self.instances, "categories", content.get("categories"), CATEGORY)
        categories = {category["id"] for category in listed}
        images = self._images(content, {ref["image_id"] for ref in refs})
        for ref in refs:
            self.seen += 1
            if what := self._foreign(ref, images, categories):
                self.odd.append(what)
            else:
                yield from self._sentences(ref, *images[ref["image_id"]])

    def _refs(self) -> list[dict[str, Any]]:
        try:
            listed = load_plain(self.file)
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read ({error.strerror}); name refs(unc).p or the like") from error
        except Exception as error:  # a broken pickle can raise nearly anything
            cause = f" ({error})" if isinstance(error, UnpicklingError) else ", or damaged"
            raise UserError(f"{self.file}: is not a list of references{cause}; download it again") from error
        refs = self.fitting(self.file, "references", listed, REFERENCE)
        splits = sorted({ref["split"] for ref in refs})
        if self.split not in splits:
            raise UserError(f"{self.file}: has no split {self.split}; there are {', '.join(splits)}")
        return [ref for ref in refs if ref["split"] == self.split]

    def _images(self, content: dict[str, Any], wanted: set[int]) -> dict[int, AnnotatedImage]:
        notes: dict[int, list[dict[str, Any]]] = {number: [] for number in wanted}
        for note in self.fitting(self.instances, "annotations", content["annotations"], INSTANCE):
            if note["image_id"] in wanted:
                notes[note["image_id"]].append(note)
        images = self.fitting(self.instances, "images", content.get("images"), IMAGE)
        listed = [image for image in images if image["id"] in wanted]
        return {
            image["id"]: (str(self.images / image["file_name"]), *self._boxes(image, notes[image["id"]])) for image in listed
        }

    def _foreign(self, ref: dict[str, Any], images: dict[int, AnnotatedImage], categories: set[int]) -> str:
        """What of a reference instances.json does not hold, for messages; '' where it holds all."""
        if ref["image_id"] not in images:
            what = f"image {ref['image_id']}"
        elif ref["category_id"] not in categories:
            what = f"category {ref['category_id']}"
        elif ref["ann_id"] not in images[ref["image_id"]][2]:
            what = f"annotation {ref['ann_id']} of image {ref['image_id']}"
        else:
            return ""
        return (
            f"reference {ref['ref_id']} is of {what}, which {self.instances} does not hold: is it the one that came with it?"
        )

    def _boxes(self, image: dict[str, Any], notes: list[dict[str, Any]]) -> tuple[tuple[Box, ...], dict[int, int | None]]:
        """The boxes of an image's instances without crowds, and the number of each annotation's box."""
        single = [note for note in notes if not note.get("iscrowd")]
        self.dropped["boxes of crowds"] += len(notes) - len(single)
        corners = [(x, y, x + w, y + h) for x, y, w, h in (note["bbox"] for note in single)]
        good, numbers = self.kept(share(*sides, image["width"], image["height"]) for sides in corners)
        found = {note["id"]: number for note, number in zip(single, numbers, strict=True)}
        return tuple(good), found | {note["id"]: None for note in notes if note.get("iscrowd")}

    def _sentences(
        self, ref: dict[str, Any], image: str, boxes: tuple[Box, ...], numbers: dict[int, int | None]
    ) -> Iterator[Example]:
        number = numbers[ref["ann_id"]]
        for said in ref["sentences"]:
            if number is None:
                self.dropped[LOST_ANSWERS] += 1
            elif not (text := said["sent"].strip()):
                self.dropped["expressions without words"] += 1
            elif not self.match.search(text):
                self.dropped["expressions that do not match"] += 1
            else:
                key = f"{ref['ref_id']}.{said['sent_id']}"
                yield Example(key, image, self.question.replace("{}", text), (number,), boxes)


class Flickr30kEntities(Listed):
    """Flickr30k Entities: one example per phrase with boxes; known boxes are all boxes of the image."""

    PHRASE = re.compile(r"\[/EN#(\d+)/\S+ ([^\]]+)\]")

    def __init__(
        self, folder: str, images: str, split: str = "train", question: str = "where is {}?", limit: int | None = None
    ) -> None:
        """Set the files; nothing is read yet.

        Args:
            folder: folder with Sentences, Annotations, and train.txt, val.txt and test.txt.
            images: folder of the images, {id}.jpg.
            split: train, val or test; or the path of another list of ids, one per line.
            question: the instruction; {} stands for the phrase.
            limit: maximum number of examples, the first ones; null for all.
        """
        ids = Path(folder) / f"{split}.txt"
        super().__init__(Path(split) if not ids.is_file() and Path(split).is_file() else ids, limit)
        self.folder, self.images, self.question = Path(folder), Path(images), asking(question)

    def read(self) -> Iterator[Example]:
        """One example per phrase; if its entity has several boxes, the answer points at each, in reading order."""
        for name in read_text(self.file, ENTITIES).split():
            self.seen += 1
            try:
                boxes, entities = self._entities(self.folder / "Annotations" / f"{name}.xml")
            except BrokenSample as error:
                self.odd.append(str(error))
                continue
            image = str(self.images / f"{name}.jpg")
            phrases = self.PHRASE.findall(read_text(self.folder / "Sentences" / f"{name}.txt", ENTITIES))
            for place, (entity, phrase) in enumerate(phrases):
                numbers = entities.get(entity, [])
                if not numbers:
                    self.dropped["phrases without a box"] += 1
                elif None in numbers:
                    self.dropped[LOST_ANSWERS] += 1
                else:
                    theirs = [number for number in numbers if number is not None]
                    answer = tuple(theirs[i] for i in reading_order([boxes[number] for number in theirs]))
                    yield Example(f"{name}.{place}", image, self.question.replace("{}", phrase), answer, boxes)

    def _entities(self, path: Path) -> tuple[tuple[Box, ...], dict[str, list[int | None]]]:
        """The boxes of an image, and the numbers of each entity's boxes. In the files pixels count from 1, inclusive.

        Raises BrokenSample for a file that is not as it ought to be.
        """
        text = read_text(path, ENTITIES)
        try:
            root = ET.fromstring(text)
            width, height = (_pixels(root, f"size/{side}", least=1) for side in ("width", "height"))
            items = [item for item in root.iterfind("object") if item.find("bndbox") is not None]
            sides = [[_pixels(item, f"bndbox/{side}") for side in EDGES] for item in items]
            good, numbers = self.kept(share(x - 1, y - 1, right, bottom, width, height) for x, y, right, bottom in sides)
        except ET.ParseError as error:
            raise BrokenSample("{}: is no XML, or broken in line {}, column {}".format(path, *error.position)) from None
        except BrokenSample as error:
            raise BrokenSample(f"{path}: {error}") from None
        entities: dict[str, list[int | None]] = {}
        for item, number in zip(items, numbers, strict=True):
            for name in item.iterfind("name"):
                entities.setdefault((name.text or "").strip(), []).append(number)
        return tuple(good), entities


EDGES = ("xmin", "ymin", "xmax", "ymax")
ENTITIES = "the folder that holds Sentences, Annotations and train.txt, val.txt, test.txt, and its split"


def _pixels(item: ET.Element, name: str, least: float = -inf) -> float:
    """A number of an XML file. Raises BrokenSample where there is none."""
    try:
        value = float(text := item.findtext(name, ""))
    except ValueError:
        raise BrokenSample(f"{name} is {text[:20]!r}, not a number") from None
    if not isfinite(value) or value < least:
        raise BrokenSample(f"{name} is {value:g}")
    return value


class Instructions(Listed):
    """Instructions in LLaVA's JSON: one example per question and answer, also in conversations of several turns."""

    def __init__(self, file: str, images: str, padded: bool = False, limit: int | None = None) -> None:
        """Set the files; nothing is read yet.

        Args:
            file: JSON list of {id, image, conversations: [{from: human, value}, {from: gpt, value}, ...]}.
            images: folder that image names are relative to.
            padded: whether boxes are relative to the image padded to a square, as in LLaVA-1.5's own files; false:
                relative to the image itself.
            limit: maximum number of examples, the first ones; null for all.
        """
        super().__init__(Path(file), limit)
        self.images, self.padded = Path(images), padded

    def read(self) -> Iterator[Example]:
        """One example per question and answer. Spelled boxes in answers become box numbers; in questions they stay text."""
        _, entries = read_annotations(self.file, ("instructions of LLaVA",), "a JSON file of LLaVA's instructions")
        for number, entry in enumerate(self.fitting(self.file, "entries", entries, TURNS)):
            if not FILE.fits(entry.get("image")):
                self.dropped["entries without an image, or of several"] += 1
                continue
            image, turns = self.images / entry["image"], entry["conversations"]
            pairs = list(zip(turns[::2], turns[1::2], strict=False))
            self.dropped[ODD_TURNS] += len(turns) % 2
            for place, (asked, told) in enumerate(pairs):
                question, answer = (turn["value"].replace("<image>", "").strip() for turn in (asked, told))
                if (asked["from"], told["from"]) != ("human", "gpt") or not question or not answer:
                    self.dropped[ODD_TURNS] += 1
                elif (pointed := self._pointed(answer, image)) is not None:
                    key = f"{entry.get('id', '')}#{number}.{place}"  # several entries can have the same id
                    yield Example(key, str(image), question, *pointed)

    def _pointed(self, text: str, image: Path) -> tuple[tuple[str | int, ...], tuple[Box, ...]] | None:
        """The pieces and boxes of an answer; None, and counted, if one of the boxes has no area."""
        pieces: list[str | int] = []
        numbers: dict[Box, int] = {}
        end = 0
        for found in SPELLED.finditer(text):
            pieces.append(text[end : found.start()])
            end = found.end()
            good, kept = self.kept(self._unpadded(sides, image) for sides in read_spelled(found[0]))
            if None in kept:
                self.dropped[LOST_ANSWERS] += 1
                return None
            pieces += [numbers.setdefault(box, len(numbers)) for box in good]
        pieces.append(text[end:])
        return tuple(piece for piece in pieces if piece != ""), tuple(numbers)

    def _unpadded(self, sides: tuple[float, ...], image: Path) -> Box | None:
        left, top, right, bottom = sides
        if not self.padded:
            return clipped(left, top, right, bottom)
        try:
            with Image.open(image, formats=FORMATS) as opened:  # the size alone, nothing is decoded
                width, height = opened.size
        except (
            OSError,
            ValueError,
            SyntaxError,
            Image.DecompressionBombError,
        ):  # missing or broken; counted with the images
            return clipped(left, top, right, bottom)
        side = max(width, height)
        x, y = (side - width) / 2, (side - height) / 2
        return share(left * side - x, top * side - y, right * side - x, bottom * side - y, width, height)


class Pope(Listed):
    """POPE: yes-or-no questions whether an object is in an image."""

    def __init__(self, file: str, images: str, limit: int | None = None) -> None:
        """Set the files; nothing is read yet.

        Args:
            file: lines of JSON {question_id, image, text, label}, coco_pope_random.json or the like.
            images: folder of the images.
            limit: maximum number of examples, the first ones; null for all.
        """
        super().__init__(Path(file), limit)
        self.images = Path(images)

    def read(self) -> Iterator[Example]:
        """One example per line."""
        wanted = "coco_pope_random.json or another of POPE's"
        for number, line in enumerate(read_text(self.file, wanted).split("\n"), 1):
            if not line.strip():
                continue
            self.seen += 1
            try:
                row = _question(line)
            except BrokenSample as error:
                self.odd.append(f"line {number}{error}")
            else:
                label = row["label"].strip().lower()
                yield Example(str(row["question_id"]), str(self.images / row["image"]), row["text"].strip(), (label,))


def _question(line: str) -> dict[str, Any]:
    """What a line of POPE holds. Raises BrokenSample where it is odd."""
    try:
        row = parse_json(line, "", "")
    except UserError as error:
        raise BrokenSample(str(error).strip(":").partition(";")[0]) from None
    if wrong := problem(row, QUESTION):
        raise BrokenSample(wrong)
    if row["label"].strip().lower() not in ("yes", "no"):
        raise BrokenSample(f" has the label {row['label'][:20]}, not yes or no")
    return row  # type: ignore[no-any-return]
