"""Rows of like length share a batch, on every device; nothing is left out, and epochs differ."""

from random import Random
from types import SimpleNamespace

import pytest

from fromage.octopus.examples import Example, characters
from fromage.octopus.sampler import WINDOW, ResumableSampler, grouped

LENGTHS = [Random(number).randrange(1, 1000) for number in range(1003)]


def padding(order, size):
    batches = [[LENGTHS[row] for row in order[i : i + size]] for i in range(0, len(order) // size * size, size)]
    return 1 - sum(map(sum, batches)) / sum(len(batch) * max(batch) for batch in batches)


def test_batches_hold_rows_of_like_length_and_come_in_any_order():
    rows = list(range(len(LENGTHS)))
    Random(0).shuffle(rows)
    order = grouped(rows, LENGTHS, 4, Random(1))
    assert sorted(order) == sorted(rows) and order[1000:] == rows[1000:], "what is left over is not chosen by length"
    assert padding(order, 4) < 0.1 < 0.3 < padding(rows, 4)
    firsts = [LENGTHS[row] for row in order[: WINDOW * 4 : 4]]
    assert firsts not in (sorted(firsts), sorted(firsts, reverse=True))
    assert order != grouped(rows, LENGTHS, 4, Random(2))


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_each_epoch_is_new_divided_among_devices_and_taken_up_where_it_stood(lengths):
    def sampler(rank, begin=0):
        trainer = SimpleNamespace(world_size=2, global_rank=rank)
        return ResumableSampler(LENGTHS, trainer, 5, begin, 4, lengths)

    mine, theirs = sampler(0), sampler(1)
    first, other = list(mine), list(theirs)
    assert len(first) == len(other) == 501 and not set(first) & set(other)
    assert list(sampler(0, begin=12)) == first[12:]
    mine.set_epoch(1)
    assert list(mine) != first
    if lengths:
        pairs = [(LENGTHS[a], LENGTHS[b]) for a, b in zip(first[:400], other[:400], strict=True)]
        assert sum(abs(a - b) for a, b in pairs) / len(pairs) < 100, "devices have batches of like length in a step"


def test_the_length_of_a_row_is_that_of_all_its_turns():
    row = [
        [Example("a", "x.png", "who?", ("a man", 0)), Example("b", "x.png", "", ("yes",))],
        [Example("c", "x.png", "go", ())],
    ]
    assert characters(row) == 4 + 5 + 1 + 3 + 2
