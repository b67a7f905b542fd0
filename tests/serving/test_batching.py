"""The queue in front of the model: what is answered together, what is refused, and what a failure costs."""

import threading
import time
from concurrent.futures import wait
from unittest.mock import patch

import pytest

from fromage.errors import UserError
from fromage.serving.batching import Batcher, Busy, Capacity, Closed


class Gate:
    """Work that waits to be let through, and notes what it was given."""

    def __init__(self):
        self.batches, self.begun, self.open = [], threading.Event(), threading.Event()

    def __call__(self, items):
        self.batches.append(items)
        self.begun.set()
        assert self.open.wait(60)
        return [item * 10 for item in items]


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def batcher():
    made = Batcher(Capacity(batch_size=3, queue=5))
    yield made
    made.close()
    made.join()


def begin(batcher, gate, item=0, group="g"):
    """The first request, which finds the thread idle."""
    future = batcher.submit(gate, item, group)
    assert gate.begun.wait(60)
    return future


def test_what_comes_meanwhile_is_answered_together(batcher, gate):
    futures = [begin(batcher, gate), *(batcher.submit(gate, i, "g") for i in range(1, 6))]
    gate.open.set()
    assert [future.result(10) for future in futures] == [0, 10, 20, 30, 40, 50]
    assert gate.batches == [[0], [1, 2, 3], [4, 5]]


def test_groups_are_kept_apart_and_the_oldest_is_next(batcher, gate):
    futures = [begin(batcher, gate)]
    futures += [batcher.submit(gate, i, group) for i, group in enumerate(["a", None, "b", "a", None], 1)]
    gate.open.set()
    wait(futures, 10)
    assert gate.batches == [[0], [1, 4], [2], [3], [5]]


def test_beyond_the_queue_requests_are_refused_until_there_is_room(batcher, gate):
    first = begin(batcher, gate)
    futures = [batcher.submit(gate, i, "g") for i in range(5)]
    for refused in (batcher.admit, lambda: batcher.submit(gate, 9, "g")):
        with pytest.raises(Busy):
            refused()
    assert futures[2].cancel() and batcher.waiting == 4
    batcher.admit()
    gate.open.set()
    assert first.result(10) == 0 and not any(2 in batch for batch in gate.batches[1:])


def test_what_is_cancelled_is_not_worked_on(batcher, gate):
    begin(batcher, gate)
    futures = [batcher.submit(gate, i, "g") for i in (1, 2)]
    assert all(future.cancel() for future in futures)
    last = batcher.submit(gate, 3, "g")
    gate.open.set()
    assert last.result(10) == 30 and gate.batches == [[0], [3]]


def test_the_fault_of_one_is_not_the_others(batcher, gate):
    def picky(items):
        if 2 in items:
            raise UserError("two is too many")
        return items

    begin(batcher, gate)
    futures = [batcher.submit(picky, i, "p") for i in (1, 2, 3)]
    gate.open.set()
    assert futures[0].result(10) == 1 and futures[2].result(10) == 3
    with pytest.raises(UserError, match="two"):
        futures[1].result(10)


def test_closing_finishes_what_runs_and_refuses_what_waits(batcher, gate):
    running, waiting = begin(batcher, gate), batcher.submit(gate, 1, "g")
    batcher.close()
    with pytest.raises(Closed):
        waiting.result(10)
    with pytest.raises(Closed):
        batcher.submit(gate, 2)
    gate.open.set()
    batcher.join()
    assert running.result(0) == 0 and gate.batches == [[0]]


def test_the_clients_of_a_batch_may_come_again_and_a_lone_one_does_not_wait(gate):
    made = Batcher(Capacity(batch_size=3))
    gate.open.set()
    assert [made.submit(gate, i).result(10) for i in range(3)] == [0, 10, 20], "alone"
    made._before = 2
    with patch("fromage.serving.batching.PAUSE", 10):
        futures = [made.submit(gate, 1, "g")]
        time.sleep(0.05)
        assert len(gate.batches) == 3
        futures.append(made.submit(gate, 2, "g"))
        wait(futures, 5)
    assert gate.batches[3:] == [[1, 2]]
    made._before = 2
    with patch("fromage.serving.batching.PAUSE", 10):
        made.submit(gate, 3, "g").cancel()
        assert made.waiting == 0
        made.close()
        made.join()


def test_one_thread_does_all_the_work(batcher):
    def who(items):
        time.sleep(0.001)
        return [threading.get_ident()] * len(items)

    futures = []

    def client():
        for _ in range(20):
            future = batcher.submit(who, 0, "w")
            futures.append(future)
            future.result(10)

    clients = [threading.Thread(target=client) for _ in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert len(futures) == 80 and len({future.result() for future in futures}) == 1


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"queue": -1}, {"timeout": 0}, {"timeout": float("nan")}])
def test_limits_that_mean_nothing(bad):
    with pytest.raises(UserError, match="must be"):
        Capacity(**bad)


def test_quick_requests_go_first_and_behind_them_the_slow_ones_that_wait(batcher, gate):
    futures = [begin(batcher, gate)]
    futures += [batcher.submit(gate, i, "slow") for i in (1, 2)]
    futures += [batcher.submit(gate, i, "quick", quick=True) for i in (3, 4)]
    gate.open.set()
    assert [future.result(10) for future in futures] == [0, 10, 20, 30, 40] and gate.batches == [[0], [3, 4], [1, 2]]


def test_quick_requests_pass_work_that_lets_them(batcher, gate):
    """Between two steps of slow work one batch of them is answered, by the same thread; the others go on waiting."""
    quick = lambda items: [(item, threading.get_ident()) for item in items]  # noqa: E731

    def slow(items):
        (result,) = gate(items)
        batcher.let_pass()
        done = [future.done() for future in passing]
        batcher.let_pass()
        return [(result, done, [future.done() for future in passing], threading.get_ident())]

    running = batcher.submit(slow, 1, "slow")
    assert gate.begun.wait(60)
    waiting = batcher.submit(gate, 2, "slow")
    passing = [batcher.submit(quick, i, i > 2, quick=True) for i in (1, 2, 3)]
    assert passing[1].cancel()
    gate.open.set()
    result, first, second, thread = running.result(10)
    assert (result, first, second) == (10, [True, True, False], [True, True, True])
    assert passing[0].result(10) == (1, thread) and passing[2].result(10) == (3, thread) and waiting.result(10) == 20


def test_a_quick_request_that_fails_harms_nothing_that_it_passes(batcher, gate):
    def fail(items):
        raise UserError("no such column")

    def slow(items):
        results = gate(items)
        batcher.let_pass()
        return results

    running = batcher.submit(slow, 1)
    assert gate.begun.wait(60)
    passing = batcher.submit(fail, 1, "quick", quick=True)
    gate.open.set()
    assert running.result(10) == 10
    with pytest.raises(UserError, match="no such column"):
        passing.result(10)


def test_neither_kind_starves_the_other(batcher, gate):
    """Each that is answered sends the next of its kind, as busy clients do."""
    done, busy = {"quick": 0, "slow": 0}, True

    def work(items):
        for kind in items:
            done[kind] += 1
            if busy:
                batcher.submit(work, kind, kind, quick=kind == "quick")
        return items

    begin(batcher, gate)
    for kind in done:
        batcher.submit(work, kind, kind, quick=kind == "quick")
    gate.open.set()
    deadline = time.monotonic() + 60
    while min(done.values()) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    busy = False
    assert min(done.values()) >= 5 and abs(done["quick"] - done["slow"]) <= 2
