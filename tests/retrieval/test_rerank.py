"""The search with callables that name rows near a query, in place of an index."""

import numpy as np
import pytest

from fromage.data.image_source import Item
from fromage.retrieval.rerank import Near, search_approximate, search_exact

VECTORS = np.eye(2, dtype=np.float32)[[0] * 9 + [1]]  # nine equal rows and another one
QUERY = VECTORS[:1]


def near(rows, whole):
    return Near(np.array(rows), VECTORS[rows], lambda i: Item(f"{rows[i]}.jpg"), whole)


@pytest.fixture
def asked():
    """The numbers of rows that were asked for."""
    return []


@pytest.fixture
def nearest(asked):
    """Names the nearest rows, equal ones against the order of the index."""

    def find(queries, n):
        asked.append(n)
        return [near([*range(8, -1, -1), 9][:n], n >= 10) for _ in queries]

    return find


def test_the_exact_search_asks_for_more_until_the_order_of_equal_scores_is_settled(nearest, asked):
    (hits,) = search_exact(nearest, QUERY, 2)
    assert [(hit.rank, hit.row, hit.score) for hit in hits] == [(1, 0, 1.0), (2, 1, 1.0)] and asked == [3, 6, 12]
    assert [hit.path for hit in search_exact(nearest, QUERY, 2, frozenset(["0.jpg"]))[0]] == ["1.jpg", "2.jpg"]
    assert len(search_exact(nearest, QUERY, 99)[0]) == 10, "all that there are"


def test_the_approximate_search_ranks_what_is_proposed_and_is_exact_where_that_runs_out(nearest, asked):
    wanted = []

    def propose(queries, n):
        wanted.append(n)
        return [near([9, 5], False) for _ in queries]

    assert [hit.row for hit in search_approximate(propose, nearest, 3, QUERY, 2)[0]] == [5, 9]
    assert wanted == [30] and asked == [], "factor times k, or times ten where k is less"
    assert [hit.row for hit in search_approximate(propose, nearest, 3, QUERY, 2, frozenset(["9.jpg"]))[0]] == [0, 1]
    assert asked, "one of two that were proposed was excluded"
