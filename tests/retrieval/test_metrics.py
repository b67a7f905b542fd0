import itertools
import math
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.retrieval import retrieval_reciprocal_rank

from fromage.retrieval.metrics import (
    ABSENT,
    Gallery,
    Scope,
    best,
    chance,
    chance_average_precision,
    joined,
    mean_average_precision,
    mean_reciprocal_rank,
    ndcg,
    places,
    rank_figures,
    ranks,
    ranks_among,
    recall_at,
    retrieval_recalls,
)


def oracle(scores, own):
    """Sorted by score, own items after all others that tie with them; the place of the first own item."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j in own))
    return next(place for place, j in enumerate(order, 1) if j in own)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000), st.integers(1, 5))
def test_ranks_are_those_of_sorting_with_ties_against_the_model(n, m, seed, chunk):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-1, 2, (n, 3), generator=generator).float()  # small integers: many ties
    gallery = torch.randint(-1, 2, (m, 3), generator=generator).float()
    targets = torch.randint(0, m, (n,), generator=generator)
    want = [oracle((q @ gallery.T).tolist(), {int(t)}) for q, t in zip(queries, targets, strict=True)]
    assert ranks(queries, gallery, targets, chunk).tolist() == want


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 10_000), st.integers(1, 5))
def test_the_best_of_several_own_items_counts(n, each, seed, chunk):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-1, 2, (n, 3), generator=generator).float()
    gallery = torch.randint(-1, 2, (n * each, 3), generator=generator).float()
    labels = torch.arange(n).repeat(each)[torch.randperm(n * each, generator=generator)]
    found = ranks(queries, gallery, torch.arange(n), chunk, labels=labels)
    for i, q in enumerate(queries):
        assert found[i] == oracle((q @ gallery.T).tolist(), {j for j, owner in enumerate(labels.tolist()) if owner == i})


def sorted_places(scores, own, left):
    """Places of the own items among those that are left, each after all others that tie with it."""
    order = sorted(left, key=lambda j: (-scores[j], j in own))
    return [place for place, j in enumerate(order, 1) if j in own]


def some_items(generator, n, m, most):
    return [torch.randperm(m, generator=generator)[: int(torch.randint(0, most + 1, (), generator=generator))].tolist()
            for _ in range(n)]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(3, 9), st.integers(0, 10_000), st.integers(1, 5), st.booleans())
def test_places_are_those_of_sorting_what_is_left(n, m, seed, chunk, subset):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-1, 2, (n, 3), generator=generator).float()
    gallery = torch.randint(-1, 2, (m, 3), generator=generator).float()
    right = [[*some, int(torch.randint(0, m, (), generator=generator))] for some in some_items(generator, n, m, 2)]
    excluded = some_items(generator, n, m, 3)  # now and then a right one, which stays
    among = some_items(generator, n, m, m) if subset else None
    found = places(queries, gallery, right, Scope(excluded, among), chunk)
    first = best(queries, gallery, 2, Scope(excluded, among), chunk)
    for i, q in enumerate(queries):
        scores = (q @ gallery.T).tolist()
        shown = [j for j in range(m) if j not in excluded[i] and (among is None or j in among[i])]
        own = set(right[i])
        want = sorted_places(scores, own, [*{*shown} | own])
        assert found[i].tolist() == [*want, *[ABSENT] * (found.shape[1] - len(want))]
        assert first[i] == sorted(shown, key=lambda j: -scores[j])[:2]
    if not subset:
        plain = places(queries, gallery, [some[-1:] for some in right], chunk=chunk)[:, 0]
        assert plain.tolist() == ranks(queries, gallery, torch.tensor([some[-1] for some in right])).tolist()


def test_of_items_that_score_alike_the_first_ones_are_best():
    gallery = torch.eye(4)[[1, 0, 0, 2, 0, 0, 3, 0]]
    assert best(torch.eye(4)[:2], gallery, 3) == [[1, 2, 4], [0, 1, 2]]
    assert best(torch.eye(4)[:1], gallery, 3, Scope(excluded=[[1, 4]])) == [[2, 5, 7]]
    assert best(torch.eye(4)[:1], gallery, 20, Scope(among=[[3, 7, 5]])) == [[5, 7, 3]]


def average_precision(order, right, k):
    """As CIRCO's evaluation has it, place by place."""
    found, total = 0, 0.0
    for place, item in enumerate(order[:k], 1):
        if item in right:
            found += 1
            total += found / place
    return total / min(len(right), k)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(2, 60), st.integers(0, 10_000))
def test_mean_average_precision_is_counted_place_by_place(n, m, seed):
    rng = random.Random(seed)
    orders = [rng.sample(range(m), m) for _ in range(n)]
    right = [rng.sample(range(m), rng.randint(1, min(m, 9))) for _ in range(n)]
    most = max(map(len, right))
    place = torch.tensor([sorted(o.index(j) + 1 for j in some) + [ABSENT] * (most - len(some))
                          for o, some in zip(orders, right, strict=True)])  # fmt: skip
    for k in (5, 10, 25, 50):
        want = statistics.mean(average_precision(o, some, k) for o, some in zip(orders, right, strict=True))
        assert mean_average_precision(place)[f"map{k}"] == pytest.approx(100 * want, abs=1e-6)


@pytest.mark.parametrize(("gallery", "own"), [(6, 1), (7, 3), (5, 5), (1, 1)])
def test_chance_of_precision_is_what_all_orders_give(gallery, own):
    each = [sorted(some) for some in itertools.combinations(range(1, gallery + 1), own)]
    want = mean_average_precision(torch.tensor(each), (2, 5, 10))
    assert chance_average_precision(gallery, own, (2, 5, 10)) == pytest.approx(want, abs=1e-9)


def test_a_gallery_of_equals_finds_nothing_first():
    rows = torch.ones(5, 2)
    assert retrieval_recalls(rows, rows)["t2i_r1"] == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10_000))
def test_recalls_of_several_texts_an_image_and_of_parts_are_as_counted(m, seed):
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    owners = [*range(m), *(rng.randrange(m) for _ in range(rng.randrange(12)))]
    texts = torch.randint(-1, 2, (len(owners), 3), generator=generator).float()
    images = torch.randint(-1, 2, (m, 3), generator=generator).float()
    cut = rng.randrange(m + 1)
    sides = [[row for row, owner in enumerate(owners) if (owner < cut) == first] for first in (True, False)]
    parts = [
        Gallery(texts[rows], images[start:stop], torch.tensor([owners[row] - start for row in rows], dtype=torch.long))
        for rows, start, stop in zip(sides, (0, cut), (cut, m), strict=True)
    ]
    scores = (texts @ images.T).tolist()
    places = {
        "t2i": [oracle(row, {owner}) for row, owner in zip(scores, owners, strict=True)],
        "i2t": [
            oracle([row[i] for row in scores], {row for row, owner in enumerate(owners) if owner == i}) for i in range(m)
        ],
    }
    want = {f"{way}_{k}": v for way, rank in places.items() for k, v in recall_at(torch.tensor(rank)).items()}
    assert retrieval_recalls(*joined(parts)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 1024])
def test_equal_rows_tie_wherever_they_lie_in_a_product(chunk):
    """A product of matrices sums in another order at its edges, so that equal rows get unequal scores."""
    generator = torch.Generator().manual_seed(0)
    for width, count in itertools.product((32, 256), (7, 33, 101, 501)):
        row, queries = (torch.nn.functional.normalize(torch.randn(n, width, generator=generator)) for n in (1, 5))
        assert ranks(queries, row.repeat(count, 1), torch.arange(5), chunk).tolist() == [count] * 5


def test_not_a_number_ranks_last():
    queries, gallery = torch.tensor([[float("nan")]]), torch.ones(7, 1)
    assert ranks(queries, gallery, torch.tensor([0])).tolist() == [7]
    scores, own = torch.tensor([[float("nan"), 1.0, float("nan")]]), torch.tensor([[True, False, False]])
    assert ranks_among(scores, own).tolist() == [3]


def test_figures_count_ranks():
    rank = torch.tensor([1, 2, 5, 6, 11])
    assert recall_at(rank) == pytest.approx({"r1": 20, "r5": 60, "r10": 80})
    assert rank_figures(rank)["median_rank"] == 5 and rank_figures(rank[:4])["median_rank"] == 3.5


def test_mrr_is_that_of_torchmetrics_where_nothing_ties():
    generator = torch.Generator().manual_seed(0)
    scores, right = torch.rand(20, 9, generator=generator), torch.randint(0, 9, (20,), generator=generator)
    own = torch.arange(9) == right.unsqueeze(1)
    want = statistics.mean(retrieval_reciprocal_rank(s, o).item() for s, o in zip(scores, own, strict=True))
    assert mean_reciprocal_rank(ranks_among(scores, own)) == pytest.approx(100 * want)


def gain(order, relevance, places):
    return sum(relevance[j] / math.log2(place + 2) for place, j in enumerate(order[:places]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_ndcg_is_the_mean_over_all_orders_that_the_scores_leave_open(seed):
    rng = random.Random(seed)
    scores = [rng.choice((0.0, 1.0, 2.0)) for _ in range(5)]
    relevance = [rng.choice((0.0, 0.0, 0.5, 1.0)) for _ in range(5)]
    relevance[rng.randrange(5)] = 0.75
    places = sum(r > 0 for r in relevance)
    orders = [o for o in itertools.permutations(range(5)) if all(scores[a] >= scores[b] for a, b in itertools.pairwise(o))]
    best = gain(sorted(range(5), key=lambda j: -relevance[j]), relevance, places)
    want = statistics.mean(gain(order, relevance, places) for order in orders) / best
    assert ndcg(torch.tensor([scores]), torch.tensor([relevance])) == pytest.approx(100 * want, rel=1e-4)


@pytest.mark.parametrize(("gallery", "own"), [(6, 1), (7, 2), (10, 5), (3, 1)])
def test_chance_is_what_all_orders_give(gallery, own):
    best = torch.tensor([1 + min(places) for places in itertools.combinations(range(gallery), own)])
    got = chance(gallery, own)
    assert {k: v for k, v in got.items() if k != "median_rank"} == pytest.approx(recall_at(best), rel=1e-4)
    assert (best <= got["median_rank"]).float().mean() >= 0.5 > (best < got["median_rank"]).float().mean()


def test_a_right_item_that_is_left_out_ranks_last_where_it_does_not_stay():
    queries = gallery = torch.eye(5)
    right, excluded = [[i] for i in range(5)], [[0, 1], [2, 3], [2, 4], [0, 1], [4, 0]]
    assert places(queries, gallery, right, Scope(excluded)).tolist() == [[1]] * 5
    assert places(queries, gallery, right, Scope(excluded, own_stays=False)).tolist() == [[5], [1], [5], [1], [5]]


def test_a_place_by_a_score_that_is_no_number_is_the_last():
    queries, gallery = torch.tensor([[1.0]]), torch.tensor([[float("nan")], [1.0], [float("nan")]])
    assert places(queries, gallery, [[0, 1]]).tolist() == [[2, 3]]
