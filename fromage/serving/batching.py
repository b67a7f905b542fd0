"""Batching: requests that wait together are answered as a batch, by the one thread that uses the model.

If the thread is idle a request is answered at once; requests that arrive meanwhile form the next batch, so batches grow with
the load. After a batch the thread waits a moment for its clients' next requests, or the first would be answered alone.

Quick requests, such as searches, pass slow ones: they go first, and work that takes long lets a batch of them pass between
its steps. Neither kind starves: at most one batch of quick requests passes at a time, and after one a slow batch begins.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

from fromage.checks import check_real, check_whole

PAUSE = 0.01  # maximum wait, in seconds, for a batch of the size of the last one

Work = Callable[[list[Any]], list[Any]]  # items -> their results, in order


@dataclass(frozen=True)
class Capacity:
    """Limits of a server. Raises UserError for invalid values.

    Attributes:
        batch_size: maximum number of requests in a batch.
        queue: maximum number of waiting requests; further ones are refused.
        timeout: maximum time of a request in seconds, including its wait.
    """

    batch_size: int = 16
    queue: int = 64
    timeout: float = 60.0

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size, 1)
        check_whole("queue", self.queue, 1)
        check_real("timeout", self.timeout, 1e-3, 1e6)

    @property
    def requests(self) -> int:
        """Maximum number of open requests, from their first byte on, since their images use memory too."""
        return self.batch_size + self.queue


class Busy(Exception):
    """The queue is full."""


class Closed(Exception):
    """The server answers no more requests."""


@dataclass(eq=False)
class _Job:
    work: Work
    item: Any
    group: Hashable | None
    quick: bool
    future: Future[Any] = field(default_factory=Future)


class Batcher:
    """A queue of requests and the thread that answers them."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity, self.closed = capacity, False
        self._waiting: list[_Job] = []
        self._before = 0  # size of the last batch
        self._passed = False  # whether it was of quick requests
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of waiting requests, without cancelled ones."""
        with self._changed:
            self._waiting = [job for job in self._waiting if not job.future.cancelled()]
            return len(self._waiting)

    def admit(self) -> None:
        """Raise Busy or Closed if submit would raise it now."""
        if self.closed:
            raise Closed
        if self.waiting >= self.capacity.queue:
            raise Busy

    def submit(self, work: Work, item: Any, group: Hashable | None = None, quick: bool = False) -> Future[Any]:
        """Queue work([item, ...]); a future that is cancelled before its turn is skipped.

        group: items with equal groups can be passed to one call of work, which must be the same function; None: alone.
        quick: it goes before requests that are not, and passes those that are being answered; see `let_pass`.
        """
        job = _Job(work, item, group, quick)
        with self._changed:
            self.admit()
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def let_pass(self) -> None:
        """Answer a batch of the quick requests that wait. Work that takes long calls it between its steps."""
        with self._changed:
            taken = self._together([job for job in self._waiting if job.quick])
        self._answer([job for job in taken if job.future.set_running_or_notify_cancel()])

    def close(self) -> None:
        """Refuse waiting and new requests with Closed; the running batch is finished."""
        with self._changed:
            self.closed, refused = True, self._waiting
            self._waiting = []
            self._changed.notify()
        for job in refused:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Closed())

    def join(self) -> None:
        """Wait for the end of the thread, after close."""
        self._thread.join()

    def _run(self) -> None:
        while not self.closed:
            self._answer([job for job in self._take() if job.future.set_running_or_notify_cancel()])

    def _take(self) -> list[_Job]:
        """The next batch: quick requests, or after such a batch slow ones; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.closed)
            self._changed.wait_for(lambda: len(self._waiting) >= self._before or self.closed, PAUSE)
            preferred = [job for job in self._waiting if job.quick is not self._passed]
            taken = self._together(preferred or self._waiting)
            self._before, self._passed = len(taken), any(job.quick for job in taken)
            return taken

    def _together(self, jobs: list[_Job]) -> list[_Job]:
        """Take the oldest of some waiting jobs out of the queue, and others of its group."""
        first = jobs[:1]
        others = [job for job in jobs[1:] if first[0].group is not None and job.group == first[0].group]
        taken = [*first, *others[: self.capacity.batch_size - 1]]
        self._waiting = [job for job in self._waiting if job not in taken]
        return taken

    def _answer(self, jobs: list[_Job]) -> None:
        """Set the results of some jobs; if a batch fails, possibly because of one job, each job is done alone."""
        if not jobs:
            return
        try:
            results = jobs[0].work([job.item for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
            else:
                for job in jobs:
                    self._answer([job])
            return
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)
