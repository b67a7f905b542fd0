"""What readers of data sets have in common: files are read on first use, and what is left out is counted and told of."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from fromage.checks import check_whole
from fromage.data.annotations import NUMBER, FieldType, Schema, fitting, leave_out
from fromage.errors import UserError
from fromage.octopus.examples import Box, Example

LOST_BOXES = "boxes of no area in their image"
LOST_ANSWERS = "examples that point at such a box"
HELD_OUT = "images that are held out"
ODD_TURNS = "turns that are no question and answer"
NO_MASK, ODD_MASK = "masks that are not there", "masks that are damaged"
ODD = "odd entries"
# Faults of the files, which are warned of; other omissions are intended.
FAULTS = (LOST_BOXES, LOST_ANSWERS, ODD_TURNS, ODD_MASK)
SIDE = FieldType("a number of pixels", lambda value: NUMBER.fits(value) and value > 0)


class FileSource:
    """Base class of the readers; files are read on first use.

    Attributes:
        dropped: after reading, the number of entries left out, by kind.
        masks: whether masks are read, where the format has them; see with_masks.
    """

    def __init__(self, file: Path, limit: int | None) -> None:
        if limit is not None:
            check_whole("limit", limit, 1)
        self.file, self.limit, self.masks = file, limit, False
        self._begin()

    def _begin(self) -> None:
        """Nothing is read yet."""
        self.__dict__.pop("examples", None)
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
        self.drop(ODD, len(self.odd))
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

    def fitting(self, path: Path, name: str, entries: Any, schema: Schema) -> list[Any]:
        """As fromage.data.annotations.fitting; what is left out is counted."""
        good = fitting(path, name, entries, schema)
        self.drop(ODD, len(entries) - len(good))
        return good

    def drop(self, what: str, count: int = 1) -> None:
        """Count what is left out."""
        if count:
            self.dropped[what] += count

    def kept(self, boxes: Iterable[Box | None]) -> tuple[list[Box], list[int | None]]:
        """The boxes with an area, and for each given box its number among them (None: it has no area)."""
        good: list[Box] = []
        numbers: list[int | None] = []
        for box in boxes:
            numbers.append(None if box is None else len(good))
            if box is None:
                self.drop(LOST_BOXES)
            else:
                good.append(box)
        return good, numbers


def with_masks(sources: Iterable[Any]) -> None:
    """Have readers read masks, a second time where they have read without; sources of other classes are left alone."""
    for source in sources:
        if isinstance(source, FileSource) and not source.masks:
            source.masks = True
            source._begin()


def check_question(question: str) -> str:
    """The question itself. Raises UserError if it does not contain {} exactly once."""
    if question.count("{}") != 1:
        raise UserError(f"question {question!r}: must hold {{}} once, where the words for the object go")
    return question
