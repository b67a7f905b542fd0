"""Requests that come together are answered together, by one thread which alone uses the model.

A request that finds the thread idle is answered at once, and those that come meanwhile form the next batch: batches grow
with the load. After a batch its clients get a moment to come again, or the first of them would be answered alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

from fromage.checks import check_real, check_whole

PAUSE = 0.01  # seconds a request may wait for as many others as were answered before it

Work = Callable[[list[Any]], list[Any]]  # items -> their results, in order


@dataclass(frozen=True)
class Capacity:
    """What a server takes on. Raises UserError for values that mean nothing.

    Attributes:
        batch_size: requests answered together, at most.
        queue: requests that may wait; beyond it they are refused.
        timeout: seconds a request may take, its wait included.
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
        """Requests at hand, at most: from the arrival of their first byte, as their images fill the memory too."""
        return self.batch_size + self.queue


class Busy(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """No more requests are answered."""


@dataclass(eq=False)
class _Job:
    work: Work
    item: Any
    group: Hashable | None
    future: Future[Any] = field(default_factory=Future)


class Batcher:
    """A queue and the thread that works it off."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity, self.closed = capacity, False
        self._waiting: list[_Job] = []
        self._before = 0  # size of the last batch
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait; those taken back do not count."""
        with self._changed:
            self._waiting = [job for job in self._waiting if not job.future.cancelled()]
            return len(self._waiting)

    def admit(self) -> None:
        """Raise what submit would raise now, Busy or Closed."""
        if self.closed:
            raise Closed
        if self.waiting >= self.capacity.queue:
            raise Busy

    def submit(self, work: Work, item: Any, group: Hashable | None = None) -> Future[Any]:
        """Have work([item, ...]) done; a future that is cancelled before its turn is left out.

        group: items of equal groups may be handed to work together, which must then be the same; None: alone.
        """
        job = _Job(work, item, group)
        with self._changed:
            self.admit()
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Refuse what waits and what comes, with Closed; what is being answered still is."""
        with self._changed:
            self.closed, refused = True, self._waiting
            self._waiting = []
            self._changed.notify()
        for job in refused:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Closed())

    def join(self) -> None:
        """Wait until the thread has come to its end, after close."""
        self._thread.join()

    def _run(self) -> None:
        while not self.closed:
            self._answer([job for job in self._take() if job.future.set_running_or_notify_cancel()])

    def _take(self) -> list[_Job]:
        """The one that has waited longest, and those that go with it; none if it was taken back, and at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.closed)
            self._changed.wait_for(lambda: len(self._waiting) >= self._before or self.closed, PAUSE)
            first = self._waiting[:1]
            others = [job for job in self._waiting[1:] if first[0].group is not None and job.group == first[0].group]
            taken = [*first, *others[: self.capacity.batch_size - 1]]
            self._waiting = [job for job in self._waiting if job not in taken]
            self._before = len(taken)
            return taken

    def _answer(self, jobs: list[_Job]) -> None:
        """Set the results of some jobs; where together they fail, as through the fault of one, each is done alone."""
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
