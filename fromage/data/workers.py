"""Worker processes of data loaders: their start, their end, their share, their errors."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from multiprocessing.queues import Queue
from threading import Thread
from typing import Any, TypeVar

from torch.utils.data import DataLoader, get_worker_info

from fromage.errors import UserError, first_line

T = TypeVar("T")
GRACE = 30  # seconds a worker outlives a SIGTERM that its whole job gets, for the step and the checkpoint under way
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent ends


def usual_workers() -> int:
    """How many processes read images beside a tower that uses the cores itself: half as many as there are cores, 1 to 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, max(1, cores // 2))


def init_worker(_: int) -> None:
    """What a DataLoader's worker does first: see to it that it ends with its parent, and to signals until then.

    It ends too when it cannot hand a batch over, where shared memory is full or files may not grow: multiprocessing would
    drop the batch, and its reader wait for good.
    """
    Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the tokenizer warns of the fork
    if sys.platform == "linux":  # a killed parent leaves workers that wait for a reader of their queue, for good
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_await_sigterm, daemon=True).start()


def _end(*_: object) -> None:
    os._exit(1)


def _await_sigterm() -> None:
    """End a worker at once when the parent asks for it, GRACE seconds later when a scheduler signals the whole job."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        signal.alarm(GRACE)
    os._exit(0)


class WorkerLoader(DataLoader):
    """A DataLoader whose workers start and end as init_worker has it, and say in one line what a user can mend."""

    def __init__(self, dataset: Any, batch_size: int | None = 1, **options: Any) -> None:
        """options: of DataLoader. Lightning builds loaders anew from their attributes, worker_init_fn among them."""
        options.setdefault("worker_init_fn", init_worker)
        super().__init__(dataset, batch_size, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches. Workers begin with the first one that is asked for: Lightning may make the iterator long before.

        A sampler knows only then where a resumed run goes on, and in which epoch.
        """
        yield from plain_errors(super().__iter__())


def worker_share() -> tuple[int, int]:
    """This worker's number, and how many workers there are; (0, 1) without workers."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def plain_errors(batches: Iterable[T]) -> Iterator[T]:
    """Pass batches on; a UserError of a worker, which comes with its traceback in the message, becomes one line again.

    Raises UserError for a worker that ended before its work did, too.
    """
    try:
        yield from batches
    except UserError as error:
        raise UserError(str(error).rstrip().rsplit("UserError: ", 1)[-1]) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        cause = "it was killed, or shared memory (/dev/shm) is full, or files may not grow"
        raise UserError(f"{first_line(error)}: {cause}; make room there, or use fewer workers") from error
