"""The images of an answer: each generated [RET] searches the image index (section 3.2)."""

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
    from fromage.retrieval.base import ImageIndex

# (hits, count) -> opened, lost; see fromage.retrieval.results.load_images
Resolve = Callable[[Iterable[Hit], int], tuple[list[Opened], list[Lost]]]
SAME = 1 - 1e-3  # cosine from which two images count as the same; bfloat16 or a re-saved JPEG changes it less


@dataclass
class RetrievedImages:
    """The images retrieved for one [RET] of an answer.

    Attributes:
        embedding: (q,) unit row, the query.
        hits: the images found, best first; empty without an index.
        images: the opened images of the hits, if the caller passed `resolve`.
        notes: messages for the reader, for example that an image could not be opened.
        rest: the hits that follow, if the images were not opened.
        why_empty: why there are no hits; '' if there are some.
    """

    embedding: np.ndarray = field(repr=False, compare=False)
    hits: list[Hit] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rest: Iterator[Hit] = field(default_factory=lambda: iter(()), repr=False, compare=False)
    why_empty: str = field(default="", compare=False)


class ImageRetriever:
    """Retrieves the images of one answer from the index: none of the prompt's own images, and none twice.

    Images are compared by path and by embedding, since a copy of an image has another path.
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
        """count: images per [RET]. features: (n, m) of the prompt's images."""
        self.model, self.index, self.resolve, self.count = model, index, resolve, count
        self.prompt, self.features = prompt, features

    def piece(self, piece: str | Tensor) -> str | RetrievedImages:
        """A piece of a draft: text is returned unchanged, hidden states (r, d) at [RET] as its images."""
        return piece if isinstance(piece, str) else self.find(piece)

    @torch.no_grad()
    def find(self, hidden: Tensor) -> RetrievedImages:
        """hidden (r, d) -> the images nearest to W_t h + b, fused and normalised (section 3.2)."""
        row = self.model.embed_ret(hidden.unsqueeze(0)).cpu().numpy()[0]  # (1, r, d) -> (q,)
        if self.index is None:
            return RetrievedImages(row, why_empty="there is no index to find one in")
        fresh = self._fresh(self.index, row)
        if self.resolve:
            opened, lost = self.resolve(fresh, self.count)
            shown = RetrievedImages(row, [hit for hit, _ in opened], [image for _, image in opened], left_out(lost))
        else:
            lost, shown = [], RetrievedImages(row, list(islice(fresh, self.count)), rest=fresh)
        if not shown.hits:
            shown.why_empty = "none of those tried could be opened" if lost else "none is left"
        self.barred.update(hit.path for hit in [*shown.hits, *(hit for hit, _ in lost)])
        # (s, q), s images seen
        self.seen = np.concatenate([self.seen, self.index.vectors_of([hit.row for hit in shown.hits])])
        return shown

    def _fresh(self, index: ImageIndex, row: np.ndarray) -> Iterator[Hit]:
        """The images nearest to a row (q,), best first, without images seen before and copies of better ones."""
        barred, passed = frozenset(self.barred), np.empty((0, len(row)), np.float32)  # (n, q)
        hits = index.search(row[None], self.count + len(self.seen), barred)[0]
        for hit in index.beyond(row, hits, barred):
            vector = index.vectors_of([hit.row])[0]  # (q,)
            if (np.concatenate([self.seen, passed]) @ vector).max(initial=-1) <= SAME:
                passed = np.concatenate([passed, vector[None]])
                yield hit._replace(rank=len(passed))

    @cached_property
    def barred(self) -> set[str]:
        """Paths of images that must not be retrieved: the prompt's, and after each search what was found."""
        parts = parts_of(self.prompt)
        paths = {str(path) for part in parts if isinstance(part, Path) for path in (part, part.absolute(), part.resolve())}
        return paths | {str(part) for part in parts if isinstance(part, Url)}

    @cached_property
    def seen(self) -> np.ndarray:
        """Embeddings (s, q) of images that must not be retrieved: the prompt's, and after each search what was found."""
        return self.model.embed_images(self.features).float().cpu().numpy()  # (n, m) -> (n, q)
