"""Rows of Octopus with the pixels or stored patches of their image; broken images are counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from fromage.data.broken import Broken
from fromage.errors import BrokenSample, UserError
from fromage.images.open import file_bytes
from fromage.images.transforms import Transform, read_image
from fromage.models.encode_files import check_lost
from fromage.octopus.collate import Collate
from fromage.octopus.examples import Example, Row
from fromage.octopus.patch_store import PatchStore
from fromage.octopus.step import GroundingBatch


class GroundingDataset(Dataset[Any]):
    """Rows with the pixels or patches of their image. If it cannot be decoded, the next row takes its place.

    Each worker counts the images it has seen, and names those it could not decode. Where more than max_lost of them are
    broken, as of fromage.data.broken.Broken, or of all there are, it stops the run.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        transform: Transform,
        store: PatchStore | None,
        max_lost: float = 0.05,
        replace: bool = True,
    ) -> None:
        """replace: whether the next row stands for one whose image is broken, as in training; else there is None."""
        self.replace = replace
        self.rows, self.transform, self.store = rows, transform, store
        self.images, self.broken = len({row[0][0].image for row in rows}), Broken(max_lost, "data.max_lost")
        self.seen: set[str] = set()
        self.lost: list[tuple[str, Path]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Row, Tensor] | None:
        """Raises UserError if no image can be decoded, or too many cannot."""
        for place in range(len(self.rows)):
            row = self.rows[(number + place) % len(self.rows)]
            example = row[0][0]
            if self.store is not None:
                return row, self.store[example.image]
            try:
                pixels = read_image(file_bytes(Path(example.image)), self.transform)
            except BrokenSample as error:
                self._count(example, str(error))
                if not self.replace:
                    return None
            else:
                self._count(example)
                return row, pixels
        raise UserError(f"no image can be decoded: {', '.join(self.broken.last)}")

    def _count(self, example: Example, cause: str = "") -> None:
        """Count an example's image, once."""
        if example.image in self.seen:
            return
        self.seen.add(example.image)
        if cause:
            self.broken.add(f"{example.key} {example.image}", cause)
            self.lost.append(("broken", Path(example.image)))
            check_lost(self.lost, self.images, self.broken.limit)
        else:
            self.broken.used()


def collated(collate: Collate, found: Sequence[tuple[Row, Tensor] | None]) -> GroundingBatch | None:
    """A batch of the rows that are not broken; None where all are."""
    rows = [row for row in found if row is not None]
    return collate(rows) if rows else None
