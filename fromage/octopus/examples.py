"""Examples of Octopus: an image, an instruction, and an answer that may point at objects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

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
    """

    key: str
    image: str
    instruction: str
    answer: tuple[str | int, ...]
    boxes: tuple[Box, ...] = ()

    @property
    def meant(self) -> tuple[int, ...]:
        """The numbers of the boxes that the answer points at, in its order, without repetitions."""
        return tuple(dict.fromkeys(piece for piece in self.answer if isinstance(piece, int)))


class Source(Protocol):
    """A data set; `lightning_configs/octopus_*.yaml` name sources by class_path and init_args."""

    def __iter__(self) -> Iterator[Example]:
        """The examples, in stored order. Raises UserError for missing files and for files of another format."""

    def __len__(self) -> int:
        """Number of examples."""
