"""Approximate kinds of index: FAISS proposes candidates, and the index ranks these by their exact scores.

A kind is flat (every row is looked at) or a factory string of FAISS: IVF4096,SQ8 (lists around 4096 centres, a byte per
number), IVF4096,PQ64 (64 bytes per row), HNSW32 (a graph) ... What they give up is a share of the true neighbours, which
is measured when the index is written: with images as queries, and with texts where there are some.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from fromage.errors import UserError
from fromage.retrieval.base import FLAT
from fromage.retrieval.rerank import RERANK_FACTOR

FLAT_UP_TO = 1_000_000  # rows
TRAINED_ON, PER_LIST = 1 << 17, 40  # rows to train on: so many, or so many per list if that is more
MEASURED_WITH = 256  # queries of each sort
RECALL = 0.97  # of the ten nearest, which the search is set to reach
CHUNK = 1 << 16  # rows


def default_kind(count: int) -> str:
    """Flat up to a million rows; beyond, lists around 4 sqrt(N) centres, in powers of two, with a byte per number."""
    return FLAT if count <= FLAT_UP_TO else lists_kind(count)


def check_kind(kind: str | None, width: int) -> None:
    """Raise UserError for a kind that cannot be made for rows of width q; None is any."""
    if kind and kind.lower() != FLAT:
        ANNIndex.empty(kind, width)


def lists_kind(count: int) -> str:
    """The kind for many rows."""
    return f"IVF{2 ** round(math.log2(4 * math.sqrt(count)))},SQ8"


class ANNIndex:
    """Rows that are likely to be the nearest.

    Attributes:
        index: FAISS index of the rows by inner product, in their order.
        kind: its factory string.
        setting: how thoroughly it looks ('nprobe=16'); '' where there is no choice.
        recall: share of an image's true ten nearest that are among the candidates for ten, as measured.
        text_recall: and of a text's; None where no texts were at hand.
    """

    def __init__(
        self, index: faiss.Index, kind: str, setting: str = "", recall: float = math.nan, text_recall: float | None = None
    ) -> None:
        self.index, self.kind, self.recall, self.text_recall = index, kind, recall, text_recall
        self.set(setting)

    @classmethod
    def empty(cls, kind: str, width: int) -> ANNIndex:
        """An index of a kind, for rows of width q, that has learnt nothing. Raises UserError for a kind FAISS has not."""
        with _made(kind):
            return cls(faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT), kind)

    @classmethod
    def train(cls, kind: str, vectors: np.ndarray, seed: int = 0) -> ANNIndex:
        """An index of a kind, trained on a sample of (N, q) rows, none of which is in it. Raises UserError as empty does."""
        made = cls.empty(kind, vectors.shape[1])
        size = min(max(TRAINED_ON, PER_LIST * _lists(made.index)), len(vectors))
        sample = np.random.default_rng(seed).choice(len(vectors), size, replace=False)  # (size,)
        with _made(f"{kind} of {len(vectors)} images"):
            made.index.train(np.ascontiguousarray(vectors[np.sort(sample)]))
        return made

    @classmethod
    def read(cls, path: Path, *known: Any, mapped: bool = True) -> ANNIndex:
        """What write wrote; known: kind and all behind it; mapped: from the disk as it is needed, and not to be changed."""
        return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0), *known)

    def write(self, path: Path) -> None:
        """Write to a file."""
        faiss.write_index(self.index, os.fspath(path))

    def set(self, setting: str) -> None:
        """Look as thoroughly as a setting says."""
        self.setting = setting
        if setting:
            faiss.ParameterSpace().set_index_parameters(self.index, setting)  # type: ignore[arg-type]

    def search(self, rows: np.ndarray, n: int) -> list[np.ndarray]:
        """For each of (B, q) unit rows the positions of n candidates, or of as many as are found."""
        _, positions = self.index.search(rows, min(n, self.index.ntotal))  # (B, n)
        return [found[found >= 0] for found in positions]

    def grow(self, vectors: np.ndarray, texts: np.ndarray) -> None:
        """Take in the rows of (N, q) vectors that are not in yet, and measure anew; arguments as of tune."""
        for start in range(self.index.ntotal, len(vectors), CHUNK):
            self.index.add(np.ascontiguousarray(vectors[start : start + CHUNK]))
        self.tune(vectors, texts)

    def tune(self, vectors: np.ndarray, texts: np.ndarray, seed: int = 0) -> None:
        """Find the cheapest setting that reaches RECALL with every sort of query, and note what it reaches.

        Args:
            vectors: (N, q) unit rows of the images. Some of them ask; the image itself is none of its nearest.
            texts: (n, q) unit rows that texts ask with, or none.
        """
        asked = np.random.default_rng(seed).choice(len(vectors), min(MEASURED_WITH, len(vectors)), replace=False)
        images = np.ascontiguousarray(vectors[asked])  # (n, q)
        alike = [near[near != i][:10] for near, i in zip(_nearest(vectors, images, 11), asked, strict=True)]
        meant = _nearest(vectors, texts, 10)  # (n, 10)
        for setting in self._settings():
            self.set(setting)
            self.recall = self._share(alike, self.search(images, RERANK_FACTOR * 10 + 1))
            self.text_recall = self._share(meant, self.search(texts, RERANK_FACTOR * 10)) if len(texts) else None
            if self.recall >= RECALL and (self.text_recall is None or self.text_recall >= RECALL):
                return

    @staticmethod
    def _share(true: Iterable[np.ndarray], found: Iterable[np.ndarray]) -> float:
        shares = [len(np.intersect1d(t, f)) / max(1, len(t)) for t, f in zip(true, found, strict=True)]
        return round(float(np.mean(shares)), 4)

    def _settings(self) -> Iterator[str]:
        """From the quickest to the most thorough."""
        if lists := _lists(self.index):
            return (f"nprobe={min(2**i, lists)}" for i in range(math.ceil(math.log2(lists)) + 1))
        return iter([f"efSearch={2**i}" for i in range(4, 11)] if "HNSW" in self.kind else [""])


@contextmanager
def _made(what: str) -> Iterator[None]:
    """Turn FAISS's errors into ours."""
    try:
        yield
    except RuntimeError as error:
        cause = str(error).strip().rpartition(": ")[2]
        raise UserError(f"kind {what}: FAISS cannot make it ({cause}); try flat") from error


def _nearest(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """(B, k) positions, or all that there are."""
    return faiss.knn(queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)[1]


def _lists(index: faiss.Index) -> int:
    """Lists of an inverted file; 0 for what is none."""
    try:
        return faiss.extract_index_ivf(index).nlist
    except RuntimeError:
        return 0
