"""The images of an answer: what each [RET] finds in the image index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fromage.models.fromage import Fromage
from fromage.models.prompts import Prompt, Url, parts_of
from fromage.retrieval.results import Hit, Lost, Opened, left_out

if TYPE_CHECKING:
    from fromage.retrieval.faiss_index import ImageIndex

Resolve = Callable[[Iterable[Hit], int], tuple[list[Opened], list[Lost]]]  # as fromage.retrieval.results.load_images
SAME = 1 - 1e-3  # cosine from which an image is the same: towers in bfloat16 or float32 and JPEG saved again differ by less


@dataclass
class Shown:
    """What stands in an answer for a [RET].

    Attributes:
        embedding: (q,) unit row, what was searched for.
        hits: the images found, best first; none without an index.
        images: the hits opened, where the caller said how.
        notes: what the reader should know of them, such as that one was gone.
        rest: the hits behind these, where the images were not opened.
        nothing: why there are no hits; '' where there are some.
    """

    embedding: np.ndarray = field(repr=False, compare=False)
    hits: list[Hit] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rest: Iterator[Hit] = field(default_factory=lambda: iter(()), repr=False, compare=False)
    nothing: str = field(default="", compare=False)


class RetrievedImages:
    """The images that one answer may show: those of the index but the prompt's own, and none twice.

    An image is known by its name and, since copies of it have others, by its embedding.
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
        """count: images for each [RET]. features: (n, m) of the prompt's images."""
        self.model, self.index, self.resolve, self.count = model, index, resolve, count
        self.prompt, self.features = prompt, features

    def piece(self, piece: str | Tensor) -> str | Shown:
        """Text as it is; for a hidden state (d,) at [RET] what it shows."""
        return piece if isinstance(piece, str) else self.find(piece)

    @torch.no_grad()
    def find(self, hidden: Tensor) -> Shown:
        """The images nearest to W_t h + b."""
        row = self.model.embed_ret(hidden.unsqueeze(0)).cpu().numpy()[0]  # (q,)
        if self.index is None:
            return Shown(row, nothing="there is no index to find one in")
        fresh = self._fresh(self.index, row)
        if self.resolve:
            opened, lost = self.resolve(fresh, self.count)
            shown = Shown(row, [hit for hit, _ in opened], [image for _, image in opened], left_out(lost))
        else:
            lost, shown = [], Shown(row, list(islice(fresh, self.count)), rest=fresh)
        if not shown.hits:
            shown.nothing = "none of those tried could be opened" if lost else "none is left"
        self.barred.update(hit.path for hit in [*shown.hits, *(hit for hit, _ in lost)])
        self.seen = np.concatenate([self.seen, self.index.vectors_of([hit.row for hit in shown.hits])])  # (s, q)
        return shown

    def _fresh(self, index: ImageIndex, row: np.ndarray) -> Iterator[Hit]:
        """The images nearest to a row (q,) that were not seen, best first; of copies the one that comes first."""
        barred, passed = frozenset(self.barred), np.empty((0, len(row)), np.float32)  # (n, q)
        hits = index.search(row[None], self.count + len(self.seen), barred)[0]
        for hit in index.beyond(row, hits, barred):
            vector = index.vectors_of([hit.row])[0]  # (q,)
            if (np.concatenate([self.seen, passed]) @ vector).max(initial=-1) <= SAME:
                passed = np.concatenate([passed, vector[None]])
                yield hit._replace(rank=len(passed))

    @cached_property
    def barred(self) -> set[str]:
        """Paths that must not be found: at first the prompt's images."""
        parts = parts_of(self.prompt)
        paths = {str(path) for part in parts if isinstance(part, Path) for path in (part, part.absolute(), part.resolve())}
        return paths | {str(part) for part in parts if isinstance(part, Url)}

    @cached_property
    def seen(self) -> np.ndarray:
        """Rows (s, q) of images that must not be found: at first the prompt's."""
        return self.model.embed_images(self.features).float().cpu().numpy()
