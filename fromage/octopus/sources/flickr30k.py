"""Flickr30k Entities (Plummer et al., ICCV 2015): phrases of captions with their boxes, and captions with boxes in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import inf, isfinite
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

from fromage.errors import BrokenSample
from fromage.io import read_text
from fromage.octopus.boxes import reading_order, relative
from fromage.octopus.examples import Box, Example
from fromage.octopus.sources.file_source import LOST_ANSWERS, FileSource, check_question

PHRASE = re.compile(r"\[/EN#(\d+)/\S+ ([^\]]+)\]")
GAP = re.compile(r"\s+([.,;:!?)%]|n't\b|'(?:s|re|ve|ll|d|m)\b)|(\()\s+")  # the sentences are in tokens
EDGES = ("xmin", "ymin", "xmax", "ymax")
ENTITIES = "the folder that holds Sentences, Annotations and train.txt, val.txt, test.txt, and its split"


class EntitiesImage(NamedTuple):
    """An image of Flickr30k Entities.

    Attributes:
        name: its id.
        path: of its file.
        boxes: those with an area.
        entities: entity -> the numbers of its boxes; None for a box without an area.
        sentences: with the entities marked.
    """

    name: str
    path: str
    boxes: tuple[Box, ...]
    entities: dict[str, list[int | None]]
    sentences: list[str]

    def pointed(self, entity: str) -> list[int | None]:
        """The numbers of an entity's boxes in reading order; None at the end for each without an area."""
        numbers = self.entities.get(entity, [])
        good = [number for number in numbers if number is not None]
        ordered = [good[i] for i in reading_order([self.boxes[number] for number in good])]
        return [*ordered, *[None] * (len(numbers) - len(good))]


class EntitiesFolder(FileSource):
    """Base class of the readers of Flickr30k Entities."""

    def __init__(self, folder: str, images: str, split: str, limit: int | None) -> None:
        ids = Path(folder) / f"{split}.txt"
        super().__init__(Path(split) if not ids.is_file() and Path(split).is_file() else ids, limit)
        self.folder, self.images = Path(folder), Path(images)

    def annotated(self) -> Iterator[EntitiesImage]:
        """The images of the split, in its order; odd files are counted."""
        for name in read_text(self.file, ENTITIES).split():
            self.seen += 1
            try:
                boxes, entities = self._entities(self.folder / "Annotations" / f"{name}.xml")
            except BrokenSample as error:
                self.odd.append(str(error))
                continue
            sentences = read_text(self.folder / "Sentences" / f"{name}.txt", ENTITIES).splitlines()
            yield EntitiesImage(name, str(self.images / f"{name}.jpg"), boxes, entities, sentences)

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
            good, numbers = self.kept(relative(x - 1, y - 1, right, bottom, width, height) for x, y, right, bottom in sides)
        except ET.ParseError as error:
            raise BrokenSample("{}: is no XML, or broken in line {}, column {}".format(path, *error.position)) from None
        except BrokenSample as error:
            raise BrokenSample(f"{path}: {error}") from None
        entities: dict[str, list[int | None]] = {}
        for item, number in zip(items, numbers, strict=True):
            for name in item.iterfind("name"):
                entities.setdefault((name.text or "").strip(), []).append(number)
        return tuple(good), entities


class Flickr30kEntities(EntitiesFolder):
    """Flickr30k Entities: one example per phrase with boxes; known boxes are all boxes of the image."""

    def __init__(
        self, folder: str, images: str, *, split: str = "train", question: str = "where is {}?", limit: int | None = None
    ) -> None:
        """Set the files; nothing is read yet.

        Args:
            folder: folder with Sentences, Annotations, and train.txt, val.txt and test.txt.
            images: folder of the images, {id}.jpg.
            split: train, val or test; or the path of another list of ids, one per line.
            question: the instruction; {} stands for the phrase.
            limit: maximum number of examples, the first ones; null for all.
        """
        super().__init__(folder, images, split, limit)
        self.question = check_question(question)

    def read(self) -> Iterator[Example]:
        """One example per phrase; if its entity has several boxes, the answer points at each, in reading order."""
        for image in self.annotated():
            for place, (entity, phrase) in enumerate(PHRASE.findall("\n".join(image.sentences))):
                numbers = image.pointed(entity)
                answer = tuple(number for number in numbers if number is not None)
                if not numbers:
                    self.drop("phrases without a box")
                elif len(answer) < len(numbers):
                    self.drop(LOST_ANSWERS)
                else:
                    asked = self.question.replace("{}", phrase)
                    yield Example(f"{image.name}.{place}", image.path, asked, answer, image.boxes)


class Flickr30kSpotting(EntitiesFolder):
    """Flickr30k Entities: one example per sentence; after each phrase with boxes the answer points at them.

    "Two girls <d50> <d26> sit on the grass <d19>." is one answer (Fig. 3); known boxes are all boxes of the image.
    """

    def __init__(
        self,
        folder: str,
        images: str,
        *,
        split: str = "train",
        instruction: str = "Describe the image with positions.",
        limit: int | None = None,
    ) -> None:
        """Set the files; nothing is read yet.

        Args:
            folder: folder with Sentences, Annotations, and train.txt, val.txt and test.txt.
            images: folder of the images, {id}.jpg.
            split: train, val or test; or the path of another list of ids, one per line.
            instruction: what is asked of every image.
            limit: maximum number of examples, the first ones; null for all.
        """
        super().__init__(folder, images, split, limit)
        self.instruction = instruction

    def read(self) -> Iterator[Example]:
        """One example per sentence that names something with a box. An object named twice is the same number twice."""
        for image in self.annotated():
            for place, sentence in enumerate(image.sentences):
                pieces = self._pieces(sentence, image)
                if all(isinstance(piece, str) for piece in pieces):
                    self.drop("sentences without a box")
                elif None in pieces:
                    self.drop(LOST_ANSWERS)
                else:
                    answer = tuple(piece for piece in pieces if piece is not None)
                    yield Example(f"{image.name}.{place}", image.path, self.instruction, answer, image.boxes)

    def _pieces(self, sentence: str, image: EntitiesImage) -> list[str | int | None]:
        """A sentence as text and the numbers of boxes; None for a box without an area.

        Boxes follow their phrase at once, and the text after them begins with its own space or punctuation: in tokens that
        hold their leading space, as the language models' do, the words are those of the sentence without boxes.
        """
        *marked, rest = PHRASE.split(sentence.strip())  # text, entity, phrase, text, entity, phrase ... and a text
        pieces: list[str | int | None] = []
        words = ""
        for text, entity, phrase in zip(marked[::3], marked[1::3], marked[2::3], strict=True):
            words += text + phrase
            if numbers := image.pointed(entity):
                pieces += [GAP.sub(r"\1\2", words), *numbers]
                words = ""
        return [*pieces, *filter(None, [GAP.sub(r"\1\2", words + rest)])]


def _pixels(item: ET.Element, name: str, least: float = -inf) -> float:
    """A number of an XML file. Raises BrokenSample where there is none."""
    try:
        value = float(text := item.findtext(name, ""))
    except ValueError:
        raise BrokenSample(f"{name} is {text[:20]!r}, not a number") from None
    if not isfinite(value) or value < least:
        raise BrokenSample(f"{name} is {value:g}")
    return value
