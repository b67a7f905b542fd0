"""Readers of data sets in their published files: RefCOCO/+/g, Flickr30k Entities, LLaVA's instructions, POPE.

Boxes are clipped to the image. Boxes without area are left out, and so are examples that point at them; both are counted,
and faults are warned of once. There is no reader for Visual Genome, only for its regions within LLaVA's instructions.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from PIL import Image

from fromage.checkpoints.safe_pickle import load_plain
from fromage.checks import check_whole
from fromage.data.annotations import malformed, read_annotations
from fromage.errors import UserError, first_line
from fromage.images.codec import FORMATS
from fromage.octopus.boxes import SPELLED, clipped, read_spelled, reading_order, share
from fromage.octopus.examples import Box, Example

LOST_BOXES = "boxes of no area in their image"
LOST_ANSWERS = "examples that point at such a box"
ODD_TURNS = "turns that are no question and answer"
BROKEN = (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError)  # raised by malformed entries
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

    def read(self) -> Iterator[Example]:
        """The examples of the files; entries that are left out are counted in `dropped`."""
        raise NotImplementedError

    @cached_property
    def examples(self) -> list[Example]:
        """The first `limit` examples. Raises UserError for no examples, missing files, and files of another format."""
        try:
            found = list(islice(self.read(), self.limit))
        except BROKEN as error:
            raise malformed(self.file, error) from error
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
            raise UserError(f"match {match!r}: is no regular expression ({error}); correct it") from error

    def read(self) -> Iterator[Example]:
        """One example per sentence; its answer is the box alone."""
        refs = self._refs()
        _, content = read_annotations(self.instances, ("boxes of COCO",), "instances.json of the same data set")
        try:
            categories = {category["id"] for category in content["categories"]}
            images = self._images(content, {ref["image_id"] for ref in refs})
        except BROKEN as error:
            raise malformed(self.instances, error) from error
        for ref in refs:
            if ref["image_id"] not in images:
                raise self._foreign(ref, f"image {ref['image_id']}")
            if ref["category_id"] not in categories:
                raise self._foreign(ref, f"category {ref['category_id']}")
            yield from self._sentences(ref, *images[ref["image_id"]])

    def _refs(self) -> list[dict[str, Any]]:
        try:
            refs = load_plain(self.file)
            splits = sorted({ref["split"] for ref in refs})
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read ({error.strerror}); name refs(unc).p or the like") from error
        except Exception as error:  # a broken pickle can raise nearly anything
            raise UserError(
                f"{self.file}: is not a list of references ({first_line(error)[:200]}); download it again"
            ) from error
        if self.split not in splits:
            raise UserError(f"{self.file}: has no split {self.split}; there are {', '.join(splits)}")
        return [ref for ref in refs if ref["split"] == self.split]

    def _images(self, content: dict[str, Any], wanted: set[int]) -> dict[int, AnnotatedImage]:
        notes: dict[int, list[dict[str, Any]]] = {number: [] for number in wanted}
        for note in content["annotations"]:
            if note["image_id"] in wanted:
                notes[note["image_id"]].append(note)
        listed = [image for image in content["images"] if image["id"] in wanted]
        return {
            image["id"]: (str(self.images / image["file_name"]), *self._boxes(image, notes[image["id"]])) for image in listed
        }

    def _foreign(self, ref: dict[str, Any], what: str) -> UserError:
        return UserError(
            f"{self.file}: reference {ref['ref_id']} is of {what}, which {self.instances} does not hold; "
            "name the instances.json that came with it"
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
        if ref["ann_id"] not in numbers:
            raise self._foreign(ref, f"annotation {ref['ann_id']} of image {ref['image_id']}")
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
        for name in self._text(self.file).split():
            boxes, entities = self._entities(self.folder / "Annotations" / f"{name}.xml")
            image = str(self.images / f"{name}.jpg")
            phrases = self.PHRASE.findall(self._text(self.folder / "Sentences" / f"{name}.txt"))
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

    def _text(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            wanted = "the folder that holds Sentences, Annotations and train.txt, val.txt, test.txt"
            raise UserError(f"{path}: cannot be read ({error.strerror}); name {wanted}, and its split") from error
        except ValueError as error:
            raise malformed(path, error) from error

    def _entities(self, path: Path) -> tuple[tuple[Box, ...], dict[str, list[int | None]]]:
        """The boxes of an image, and the numbers of each entity's boxes. In the files pixels count from 1, inclusive."""
        text = self._text(path)
        try:
            root = ET.fromstring(text)
            width, height = (float(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
            items = [item for item in root.iterfind("object") if item.find("bndbox") is not None]
            sides = [[float(item.findtext(f"bndbox/{side}", "")) for side in EDGES] for item in items]
            good, numbers = self.kept(share(x - 1, y - 1, right, bottom, width, height) for x, y, right, bottom in sides)
        except (ET.ParseError, ValueError, ZeroDivisionError) as error:
            raise malformed(path, error) from error
        entities: dict[str, list[int | None]] = {}
        for item, number in zip(items, numbers, strict=True):
            for name in item.iterfind("name"):
                entities.setdefault((name.text or "").strip(), []).append(number)
        return tuple(good), entities


EDGES = ("xmin", "ymin", "xmax", "ymax")


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
        for number, entry in enumerate(entries):
            if not isinstance(entry.get("image"), str):
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
        except OSError:  # missing or broken; counted with the images
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
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            wanted = "coco_pope_random.json or another of POPE's"
            raise UserError(f"{self.file}: cannot be read ({error.strerror}); name {wanted}") from error
        for row in (json.loads(line) for line in lines if line.strip()):
            if (label := row["label"].strip().lower()) not in ("yes", "no"):
                raise UserError(f"{self.file}: question {row['question_id']} has the label {label}, not yes or no")
            yield Example(str(row["question_id"]), str(self.images / row["image"]), row["text"].strip(), (label,))
