"""What Octopus learns from and is asked: an image, an instruction, and an answer that may point at objects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

Box = tuple[float, float, float, float]  # left, top, right, bottom; shares of the image's width and height, 0 to 1


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction about one image.

    Attributes:
        key: its name, unique in its source.
        image: path of the image's file.
        instruction: text of the user.
        answer: text of the model in pieces; a whole number is a place where it points at the box of that number.
        boxes: objects of the image that are known, those meant first or not; the ones the answer points at among them.
    """

    key: str
    image: str
    instruction: str
    answer: tuple[str | int, ...]
    boxes: tuple[Box, ...] = ()

    @property
    def meant(self) -> tuple[int, ...]:
        """The numbers of the boxes that the answer points at, in its order, each once."""
        return tuple(dict.fromkeys(piece for piece in self.answer if isinstance(piece, int)))


class Source(Protocol):
    """A data set: what `lightning_configs/octopus_*.yaml` name by class_path and init_args."""

    def __iter__(self) -> Iterator[Example]:
        """Its examples, in stored order. Raises UserError for files that are missing or of another kind."""

    def __len__(self) -> int:
        """How many there are."""
