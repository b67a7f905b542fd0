"""Exact re-ranking: an index proposes rows near a query by approximate or rounded scores; here they are scored exactly.

score = <query, row> of unit vectors, the cosine, summed in float64. Every kind of index therefore gives an image the same
score, and equal scores come in the order of the index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.retrieval.results import Hit

RERANK_FACTOR = 5  # candidates per image that is asked for, unless the index says more; as many as for ten at least
NEAR_TIE = 1e-5  # float32 scores that differ by less may be in another order in float64
ROUNDING = 1e-3  # and scores of rows in float16, which are not quite of unit length


class Near(NamedTuple):
    """n rows near a query, in any order."""

    rows: np.ndarray  # (n,) whole numbers that rise in the order of the index
    vectors: np.ndarray  # (n, q), float32 or rounded to float16
    item: Callable[[int], Item]  # i -> the image of the i-th
    whole: bool  # no more can be had by asking for more


Search = Callable[[np.ndarray, int], list[Near]]  # unit queries (B, q), n -> for each query n rows that are near it


def search_exact(nearest: Search, rows: np.ndarray, k: int, excluded: frozenset[str] = frozenset()) -> list[list[Hit]]:
    """The true k nearest to each of the unit queries `rows` (B, q), best first; fewer where there are not as many.

    Args:
        nearest: gives the n nearest rows, up to the rounding of float32; fewer, and whole, where there are not as many.
        excluded: paths that must not be found.
    """
    n = k + len(excluded) + 1
    first = nearest(rows, n)  # n for each of B
    return [_settle(nearest, row, near, n, k, excluded) for row, near in zip(rows, first, strict=True)]


def _settle(nearest: Search, row: np.ndarray, near: Near, n: int, k: int, excluded: frozenset[str]) -> list[Hit]:
    """Rank the n that are near a query (q,), and ask for more until the last of it is clearly worse than the k-th."""
    hits, worst = rerank(row, near, k, excluded)
    while not near.whole and (len(hits) < k or worst > hits[-1].score - NEAR_TIE):
        n *= 2
        near = nearest(row[None], n)[0]
        hits, worst = rerank(row, near, k, excluded)
    return hits


def search_approximate(
    propose: Search, nearest: Search, factor: int, rows: np.ndarray, k: int, excluded: frozenset[str] = frozenset()
) -> list[list[Hit]]:
    """The best k of the rows that are proposed to each of the unit queries `rows` (B, q); the true k where those run out.

    Args:
        propose: as nearest, but may miss some.
        nearest: as of search_exact; excluded too.
        factor: rows proposed per image that is asked for.
    """
    nearby = propose(rows, factor * max(10, k + len(excluded)))
    found = [rerank(row, near, k, excluded)[0] for row, near in zip(rows, nearby, strict=True)]
    return [
        hits if len(hits) == k or near.whole else search_exact(nearest, row[None], k, excluded)[0]
        for row, hits, near in zip(rows, found, nearby, strict=True)
    ]


def rerank(query: np.ndarray, near: Near, k: int, excluded: frozenset[str] = frozenset()) -> tuple[list[Hit], float]:
    """The best k of the rows near a query (q,), best first, and an upper bound of the lowest score of all of them.

    excluded: paths that must not be found.
    """
    keep, worst = _likely(query, near.vectors, k + len(excluded))  # (m,) of the n
    rows, vectors = near.rows[keep], as_float32(near.vectors[keep]).astype(np.float64)  # (m,), (m, q)
    scores = (vectors * query).sum(axis=1)  # (m,); a matrix product could give equal rows unequal sums
    scores[~np.isfinite(scores)] = -1  # of a damaged row
    hits: list[Hit] = []
    for i in np.lexsort((rows, -scores)):
        item = near.item(keep[i])
        if item.path not in excluded:
            hits.append(Hit(len(hits) + 1, float(scores[i]), item.path, item.caption, int(rows[i]), item.meta))
        if len(hits) == k:
            break
    return hits, worst


def _likely(query: np.ndarray, vectors: np.ndarray, n: int) -> tuple[np.ndarray, float]:
    """Those of (N, q) rows that can be among the n best, by a product in float32; and the worst score of all."""
    scores = _widened(vectors) @ query  # (N,)
    scores[~np.isfinite(scores)] = -1
    margin = ROUNDING if vectors.dtype == np.float16 else NEAR_TIE
    if n >= len(scores):
        return np.arange(len(scores)), float(scores.min(initial=1)) + margin
    return np.flatnonzero(scores >= np.partition(scores, -n)[-n] - 2 * margin), float(scores.min()) + margin


def as_float32(vectors: np.ndarray) -> np.ndarray:
    """(n, q) unit rows as float32; those that were rounded to float16 are scaled to unit length again."""
    if vectors.dtype == np.float32:
        return vectors
    rows = _widened(vectors)  # (n, q)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-3)


def _widened(vectors: np.ndarray) -> np.ndarray:
    """Any rows as float32; torch does so 20 times as fast as NumPy."""
    if vectors.dtype == np.float32:
        return vectors
    return torch.from_numpy(np.require(vectors, np.float16, ["C", "W"])).float().numpy()


def unit(rows: np.ndarray, whose: str) -> np.ndarray:
    """(n, q) rows at unit length, float32. Raises UserError for what are no numbers, zero rows, infinities and NaN."""
    try:
        rows = np.ascontiguousarray(rows, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"embeddings of {whose} are no numbers; search_index takes texts") from error
    if rows.ndim != 2:
        raise UserError(f"embeddings of {whose} have the shape {rows.shape}; expected (rows, width)")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)  # (n, 1)
    if not _are_lengths(lengths).all():
        raise UserError(f"embeddings of {whose} hold zero rows, infinities or NaN; make them again, from a sound checkpoint")
    return rows / lengths  # (n, q)


def has_direction(rows: np.ndarray) -> np.ndarray:
    """(n,) truth values: which of (n, q) rows can be scaled to unit length; not zero rows, infinities and NaN."""
    return _are_lengths(np.linalg.norm(rows, axis=1))  # (n,)


def _are_lengths(lengths: np.ndarray) -> np.ndarray:
    return np.isfinite(lengths) & (lengths > 0)
