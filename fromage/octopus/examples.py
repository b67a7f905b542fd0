"""Examples of Octopus: an image, an instruction, and an answer that may point at objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from random import Random
from typing import Protocol

from fromage.octopus.segments import Mask

Box = tuple[float, float, float, float]  # left, top, right, bottom, relative to the image's width and height (0 to 1)


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction about one image.

    Attributes:
        key: its name, unique in its source.
        image: path of the image file.
        instruction: text of the user.
        answer: text of the model in pieces; an integer is an index into boxes, where the answer points at that box.
        boxes: all known objects of the image, including those the answer points at, in any order.
        dialogue: the name of the conversation it is a turn of, whose examples follow one another; '': it stands alone.
        masks: those of the boxes `meant`, in the same order; None where a mask is not known. Empty: no mask is known.
    """

    key: str
    image: str
    instruction: str
    answer: tuple[str | int, ...]
    boxes: tuple[Box, ...] = ()
    dialogue: str = ""
    masks: tuple[Mask | None, ...] = ()

    @property
    def meant(self) -> tuple[int, ...]:
        """The numbers of the boxes that the answer points at, in its order, without repetitions."""
        return tuple(dict.fromkeys(piece for piece in self.answer if isinstance(piece, int)))

    @property
    def target_boxes(self) -> list[Box]:
        """The boxes that the answer points at, in its order, as often as it does."""
        return [self.boxes[piece] for piece in self.answer if isinstance(piece, int)]

    @property
    def words(self) -> str:
        """The answer without its boxes."""
        return " ".join(piece for piece in self.answer if isinstance(piece, str))


Conversation = list[Example]  # turns about one image, in order; only the last answer may point at boxes
Row = list[Conversation]  # about one image


def conversations(examples: Iterable[Example]) -> Iterator[Conversation]:
    """The turns of each dialogue together; a dialogue is cut after an answer that points at boxes.

    A later turn would have to see such an answer's index tokens, which are known only after the recognition.
    """
    turns: Conversation = []
    for example in examples:
        last = turns[-1] if turns else None
        if last and (not example.dialogue or (example.dialogue, example.image) != (last.dialogue, last.image) or last.meant):
            yield turns
            turns = []
        turns.append(example)
    if turns:
        yield turns


def rows_of(examples: Iterable[Example], per_image: int, seed: int) -> list[Row]:
    """Conversations about one image together, in an order of their own, at most per_image in a row; images as they come."""
    images: dict[str, Row] = {}
    for turns in conversations(examples):
        images.setdefault(turns[0].image, []).append(turns)
    rows = []
    for theirs in images.values():
        Random(f"{seed} {theirs[0][0].key}").shuffle(theirs)  # not by the path, which differs from machine to machine
        count = ceil(len(theirs) / per_image)
        rows += [theirs[start::count] for start in range(count)]
    return rows


class Source(Protocol):
    """A data set; `lightning_configs/octopus_*.yaml` name sources by class_path and init_args."""

    def __iter__(self) -> Iterator[Example]:
        """The examples, in stored order. Raises UserError for missing files and for files of another format."""

    def __len__(self) -> int:
        """Number of examples."""
