"""The rows that a filter lets pass, as FAISS takes them, and the exact search among these rows or all."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

from fromage.retrieval.rerank import as_float32

RARE = 1 << 14  # rows; so few are all looked at
CHUNK = 1 << 15  # rows


class Chosen:
    """Rows of an index that a filter lets pass.

    Attributes:
        rows: (n,) their numbers, rising.
        share: of all rows.
        selector: the same for FAISS.
    """

    def __init__(self, rows: np.ndarray, count: int) -> None:
        self.rows, self.share = rows, len(rows) / max(1, count)
        mask = np.zeros(count, bool)
        mask[rows] = True
        self._bits, self._near = np.packbits(mask, bitorder="little"), np.empty((0, 0), np.float32)  # FAISS copies none
        self.selector = faiss.IDSelectorBitmap(count, faiss.swig_ptr(self._bits))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def rare(self) -> bool:
        """Whether they are so few that all of them are looked at."""
        return len(self) <= RARE

    def has(self, rows: np.ndarray) -> np.ndarray:
        """(n,) truth values: which of some rows are among them."""
        return (self._bits[rows >> 3] >> (rows & 7) & 1).astype(bool)

    def near(self, vectors: np.ndarray) -> np.ndarray:
        """(n, q) float32, their rows of (N, q); kept in memory, since the same filter is often used again."""
        if len(self._near) != len(self):
            self._near = as_float32(vectors[self.rows])
        return self._near


def knn(queries: np.ndarray, vectors: np.ndarray, n: int, chosen: Chosen | None = None) -> np.ndarray:
    """(B, n) positions of the rows among (N, q) nearest to each of (B, q) unit queries, the best first; -1 for none."""
    n = min(n, len(vectors) if chosen is None else len(chosen))
    if not n or not len(queries):
        return np.empty((len(queries), n), np.int64)
    if chosen is not None and chosen.rare:
        at = _best(queries, chosen.near(vectors), n)[1]  # (B, n)
        return np.where(at < 0, -1, chosen.rows[at])
    if vectors.dtype == np.float16:
        return _in_chunks(queries, vectors, n, chosen)
    if chosen is None:
        return _best(queries, vectors, n)[1]
    scores, found = np.empty((len(queries), n), np.float32), np.empty((len(queries), n), np.int64)
    pointers = map(faiss.swig_ptr, (np.ascontiguousarray(queries), vectors))
    sizes = vectors.shape[1], len(queries), len(vectors), n
    among: Any = faiss.knn_inner_product  # whose stub knows no selector
    among(*pointers, *sizes, faiss.swig_ptr(scores), faiss.swig_ptr(found), chosen.selector)
    return found


def _best(queries: np.ndarray, vectors: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    return faiss.knn(queries, vectors, n, metric=faiss.METRIC_INNER_PRODUCT)


def _in_chunks(queries: np.ndarray, vectors: np.ndarray, n: int, chosen: Chosen | None) -> np.ndarray:
    """As knn, of rows in float16."""
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)  # (B, 0 to 2 n)
    for start in range(0, len(vectors) if chosen is None else len(chosen), CHUNK):
        part = np.arange(start, min(start + CHUNK, len(vectors))) if chosen is None else chosen.rows[start : start + CHUNK]
        some = as_float32(vectors[start : start + CHUNK] if chosen is None else vectors[part])
        score, at = _best(queries, some, min(n, len(part)))
        scores, rows = np.hstack([scores, score]), np.hstack([rows, np.where(at < 0, -1, part[at])])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :n]
        scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    return rows
