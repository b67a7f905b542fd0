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
SAME = 1e-5  # a cosine this near to 1 is the same picture, whatever its name


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
    """The pictures that one answer may show: those of the index but the prompt's own, and none twice.

    A picture is known by its name and, since copies of it have others, by its embedding.
    """

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
        hits = self._fresh(row, self.count + (SPARE if self.resolve else 0))
        opened, notes = self.resolve(hits, self.count) if self.resolve else ([], [])
        shown = [hit for hit, _ in opened] if self.resolve else hits
        self.barred.update(hit.path for hit in hits[: len(shown) + len(notes)])
        self.seen = np.concatenate([self.seen, self.index.vectors[[hit.row for hit in shown]]])  # (s, q)
        return Shown(row[0], shown, [picture for _, picture in opened], notes)

    def _fresh(self, row: np.ndarray, count: int) -> list[Hit]:
        """The pictures nearest to a row (1, q) that were not seen; of copies the one that comes first."""
        assert self.index is not None
        k = count + len(self.seen)
        while True:
            hits = self.index.search(row, k, exclude=self.barred)[0]
            rows = self.index.vectors[[hit.row for hit in hits]]  # (n, q)
            same = np.concatenate([self.seen, rows]) @ rows.T > self._least  # (s + n, n)
            known = np.triu(same, 1 - len(self.seen)).any(axis=0)  # (n,), to a row in front of their own
            fresh = [hit for hit, is_known in zip(hits, known, strict=True) if not is_known][:count]
            if len(fresh) == count or len(hits) < k:
                return [hit._replace(rank=rank) for rank, hit in enumerate(fresh, 1)]
            k *= 2

    @property
    def _least(self) -> float:
        """Cosine of two embeddings of one picture."""
        return 1 - max(SAME, torch.finfo(self.model.vision.dtype).eps ** 2)

    @cached_property
    def barred(self) -> set[str]:
        """Paths that must not be found: at first the prompt's pictures."""
        parts = parts_of(self.prompt)
        paths = {str(path) for part in parts if isinstance(part, Path) for path in (part, part.absolute(), part.resolve())}
        return paths | {str(part) for part in parts if isinstance(part, Url)}

    @cached_property
    def seen(self) -> np.ndarray:
        """Rows (s, q) of pictures that must not be found: at first the prompt's."""
        return self.model.embed_images(self.features).float().cpu().numpy()
