"""The pictures of an answer: what each [RET] finds in the image index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fromage.hits import SPARE, Hit, Opened
from fromage.model import Fromage
from fromage.prompts import Prompt, Url, parts_of

if TYPE_CHECKING:
    from fromage.index import ImageIndex

Resolve = Callable[[Sequence[Hit], int], tuple[list[Opened], list[str]]]  # as fromage.hits.openable
SAME = 1e-5  # a cosine this near to 1 is the same picture embedded twice


@dataclass
class Shown:
    """What stands in an answer for a [RET].

    Attributes:
        embedding: (q,) unit row, what was searched for.
        hits: the pictures found, best first; none without an index.
        pictures: the hits opened, where the caller said how.
        notes: what the reader should know of them, such as that one was gone.
    """

    embedding: np.ndarray = field(repr=False, compare=False)
    hits: list[Hit] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Gallery:
    """The pictures that one answer may show: those of the index but the prompt's own, and none twice."""

    def __init__(
        self,
        model: Fromage,
        index: ImageIndex | None,
        resolve: Resolve | None,
        count: int,
        prompt: Prompt,
        features: Tensor,
    ) -> None:
        """count: pictures for each [RET]. features: (n, m) of the prompt's pictures."""
        self.model, self.index, self.resolve, self.count = model, index, resolve, count
        self.prompt, self.features = prompt, features

    def piece(self, piece: str | Tensor) -> str | Shown:
        """Text as it is; for a hidden state (d,) at [RET] what it shows."""
        return piece if isinstance(piece, str) else self.find(piece)

    @torch.no_grad()
    def find(self, hidden: Tensor) -> Shown:
        """The pictures nearest to W_t h + b."""
        row = self.model.embed_ret(hidden.unsqueeze(0)).cpu().numpy()  # (1, q)
        if self.index is None:
            return Shown(row[0])
        hits = self.index.search(row, self.count + (SPARE if self.resolve else 0), exclude=self.barred)[0]
        if self.resolve is None:
            self.barred.update(hit.path for hit in hits)
            return Shown(row[0], hits)
        opened, notes = self.resolve(hits, self.count)
        self.barred.update(hit.path for hit in hits[: len(opened) + len(notes)])
        return Shown(row[0], [hit for hit, _ in opened], [picture for _, picture in opened], notes)

    @cached_property
    def barred(self) -> set[str]:
        """Paths that must not be found: the prompt's pictures by name and, whatever their name, by embedding."""
        parts = parts_of(self.prompt)
        paths = {str(path) for part in parts if isinstance(part, Path) for path in (part, part.absolute(), part.resolve())}
        return paths | {str(part) for part in parts if isinstance(part, Url)} | self._twins()

    def _twins(self) -> set[str]:
        """Paths of pictures in the index whose embedding is that of one of the prompt, to rounding."""
        if self.index is None or not len(self.features):
            return set()
        rows, k = self.model.embed_images(self.features).cpu().numpy(), 8  # (n, q)
        least = 1 - max(SAME, torch.finfo(self.model.vision.dtype).eps ** 2)
        while True:
            found = self.index.search(rows, k)
            if k >= len(self.index) or all(hits[-1].score < least for hits in found):
                return {hit.path for hits in found for hit in hits if hit.score >= least}
            k *= 2
