"""Instructions in LLaVA's JSON (Liu et al., NeurIPS 2023), boxes spelled in them as in Shikra's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from fromage.data.annotation_formats import read_annotations
from fromage.data.annotations import FILE, TEXT, Schema
from fromage.images.codec import FORMATS
from fromage.octopus.boxes import SPELLED, clipped, read_spelled, relative, spelled
from fromage.octopus.examples import Box, Example
from fromage.octopus.sources.file_source import HELD_OUT, LOST_ANSWERS, ODD_TURNS, FileSource
from fromage.octopus.sources.references import held_out

COCO = re.compile(r"(?:^|_)(\d{12})$")  # the name of a photograph of COCO, without its ending
TURNS: Schema = {"conversations": [{"from": TEXT, "value": TEXT}]}  # image and id may be anything


class Instructions(FileSource):
    """Instructions in LLaVA's JSON: one example per question and answer, also in conversations of several turns."""

    def __init__(
        self, file: str, images: str, *, padded: bool = False, apart_from: Sequence[str] = (), limit: int | None = None
    ) -> None:
        """Set the files; nothing is read yet.

        Args:
            file: JSON list of {id, image, conversations: [{from: human, value}, {from: gpt, value}, ...]}.
            images: folder that image names are relative to.
            padded: whether boxes are relative to the image padded to a square, as in LLaVA-1.5's own files; false:
                relative to the image itself.
            apart_from: files of references, such as refs(unc).p; images of COCO in their splits other than train are left
                out, by the number in the file's name.
            limit: maximum number of examples, the first ones; null for all.
        """
        super().__init__(Path(file), limit)
        self.images, self.padded, self.apart_from = Path(images), padded, tuple(apart_from)

    def read(self) -> Iterator[Example]:
        """One example per question and answer, the turns of a conversation one after the other.

        Spelled boxes in answers become box numbers; in questions they stay text, relative to the image itself.
        """
        barred, left_out = held_out(self.apart_from), set()
        _, entries = read_annotations(self.file, ("instructions of LLaVA",), "a JSON file of LLaVA's instructions")
        for number, entry in enumerate(self.fitting(self.file, "entries", entries, TURNS)):
            if not FILE.fits(entry.get("image")):
                self.drop("entries without an image, or of several")
                continue
            image, turns = self.images / entry["image"], entry["conversations"]
            if (number_of_coco := COCO.search(image.stem)) and int(number_of_coco[1]) in barred:
                left_out.add(image)
                continue
            pairs = list(zip(turns[::2], turns[1::2], strict=False))
            self.drop(ODD_TURNS, len(turns) % 2)
            for place, (asked, told) in enumerate(pairs):
                question, answer = (turn["value"].replace("<image>", "").strip() for turn in (asked, told))
                if (asked["from"], told["from"]) != ("human", "gpt") or not question or not answer:
                    self.drop(ODD_TURNS)
                elif (asked_of := self._asked(question, image)) and (pointed := self._pointed(answer, image)):
                    key = f"{entry.get('id', '')}#{number}.{place}"  # several entries can have the same id
                    yield Example(key, str(image), asked_of, *pointed, dialogue=f"#{number}")
        self.drop(HELD_OUT, len(left_out))

    def _asked(self, text: str, image: Path) -> str | None:
        """A question with its boxes relative to the image itself; None, and counted, if one of them has no area."""
        if not self.padded or not SPELLED.search(text):
            return text
        good, kept = self.kept(
            self._unpadded(sides, image) for found in SPELLED.finditer(text) for sides in read_spelled(found[0])
        )
        if None in kept:
            self.drop(LOST_ANSWERS)
            return None
        boxes = iter(good)
        return SPELLED.sub(
            lambda found: ";".join(spelled(next(boxes)) for _ in read_spelled(found[0])).replace("];[", ";"), text
        )

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
                self.drop(LOST_ANSWERS)
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
        # missing or broken; counted with the images
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return clipped(left, top, right, bottom)
        side = max(width, height)
        x, y = (side - width) / 2, (side - height) / 2
        return relative(left * side - x, top * side - y, right * side - x, bottom * side - y, width, height)
