import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fromage.metrics import ranks, recall_at, retrieval_recalls


def oracle(scores, target):
    """Sorted by score, the target behind all that tie with it."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j == target))
    return order.index(target) + 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000), st.integers(1, 5))
def test_ranks_are_those_of_sorting_with_ties_against_the_model(n, m, seed, chunk):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-1, 2, (n, 3), generator=generator).float()  # small integers: many ties
    gallery = torch.randint(-1, 2, (m, 3), generator=generator).float()
    targets = torch.randint(0, m, (n,), generator=generator)
    want = [oracle((q @ gallery.T).tolist(), int(t)) for q, t in zip(queries, targets, strict=True)]
    assert ranks(queries, gallery, targets, chunk).tolist() == want


def test_a_gallery_of_equals_finds_nothing_first():
    rows = torch.ones(5, 2)
    assert retrieval_recalls(rows, rows)["t2i_r1"] == 0


def test_not_a_number_ranks_last():
    queries, gallery = torch.tensor([[float("nan")]]), torch.ones(7, 1)
    assert ranks(queries, gallery, torch.tensor([0])).tolist() == [7]


def test_recall_at_counts_ranks():
    assert recall_at(torch.tensor([1, 2, 5, 6, 11])) == pytest.approx({"r1": 20, "r5": 60, "r10": 80})
