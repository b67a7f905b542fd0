"""Exact re-ranking: an index proposes rows near a query by approximate or rounded scores; here they are scored exactly.

score = <query, row> of unit vectors, the cosine, summed in float64. Every kind of index therefore gives an image the same
score, and equal scores come in the order of the index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.retrieval.results import Hit

RERANK_FACTOR = 5  # candidates per image that is asked for, and as many as for ten at least
NEAR_TIE = 1e-5  # float32 scores that differ by less may be in another order in float64


class Near(NamedTuple):
    """n rows near a query, in any order."""

    rows: np.ndarray  # (n,) whole numbers that rise in the order of the index
    vectors: np.ndarray  # (n, q)
    item: Callable[[int], Item]  # i -> the image of the i-th
    whole: bool  # no more can be had by asking for more


def rerank(query: np.ndarray, near: Near, k: int, excluded: frozenset[str] = frozenset()) -> tuple[list[Hit], float]:
    """The best k of the rows near a query (q,), best first, and the worst score among all of the rows.

    excluded: paths that must not be found.
    """
    vectors = near.vectors.astype(np.float64)  # (n, q)
    scores = (vectors * query).sum(axis=1)  # (n,); a matrix product could give equal rows unequal sums
    scores[~np.isfinite(scores)] = -1  # of a damaged row
    hits: list[Hit] = []
    for i in np.lexsort((near.rows, -scores)):
        item = near.item(i)
        if item.path not in excluded:
            hits.append(Hit(len(hits) + 1, float(scores[i]), item.path, item.caption, int(near.rows[i]), item.meta))
        if len(hits) == k:
            break
    return hits, scores.min(initial=1)


def unit(rows: np.ndarray, whose: str) -> np.ndarray:
    """(n, q) rows at unit length, float32. Raises UserError for what are no numbers, zero rows, infinities and NaN."""
    try:
        rows = np.ascontiguousarray(rows, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"embeddings of {whose} are no numbers; search_index takes texts") from error
    if rows.ndim != 2:
        raise UserError(f"embeddings of {whose} have the shape {rows.shape}; expected (rows, width)")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)  # (n, 1)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise UserError(f"embeddings of {whose} hold zero rows, infinities or NaN; make them anew, from a sound checkpoint")
    return rows / lengths  # (n, q)
