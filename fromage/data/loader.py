"""From the streams of fromage.data.streams to a run: workers, epochs, and going on in the middle of one.

torchdata's StatefulDataLoader (0.11) gives the same rest of an epoch, but decodes every batch before it again, keeps the
position of one device alone, and accepts another batch size in the middle of an epoch: `ResumeState`, its gathering and the
check of the layout would all remain under it.
"""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from fromage.data.workers import WorkerLoader
from fromage.errors import UserError

if TYPE_CHECKING:
    from fromage.data.batches import Batch
    from fromage.data.streams import BatchStream, TrainStream

log = logging.getLogger(__name__)
BEFORE = {"data.captions_per_image": None, "data.requests": 0.0}  # what a layout meant without such an option


class Loader(WorkerLoader):
    """The batches of a stream."""

    def __init__(self, stream: BatchStream, workers: int = 0) -> None:
        super().__init__(
            stream,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        warnings.filterwarnings("ignore", r".*IterableDataset. has .__len__")  # the stream shares out its length


class BatchIterable:
    """An iterable and nothing more."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def no_loaders() -> list[Any]:
    """What a data module without validation data returns; Lightning would warn of it."""
    warnings.filterwarnings("ignore", r"Total length of .list. across ranks is zero")
    return []


class ResumeState(NamedTuple):
    """Where a device stands in an epoch.

    Attributes:
        given: batches so far.
        turn: the worker that gives the next one.
        places: per worker, the batches it gave and the stored samples it took for them, broken ones included.
    """

    given: int
    turn: int
    places: list[list[int]]

    def after(self, worker: int, taken: int) -> ResumeState:
        """Where it stands after one more batch, for which a worker took so many samples since the epoch began."""
        places = [list(place) for place in self.places]
        places[worker] = [places[worker][0] + 1, taken]
        return ResumeState(self.given + 1, (worker + 1) % len(places), places)


class TrainLoader(Loader):
    """Counts epochs for its stream, and goes on exactly where a checkpoint in the middle of one left off.

    The samples before that are read once more, but not decoded. A shard that could be read then and cannot be now, or the
    other way round, shifts the samples after it.
    """

    dataset: TrainStream

    def __init__(self, stream: TrainStream, workers: int = 0, epoch: int = 0, exact: bool = True, loop: Any = None) -> None:
        """Make ready for an epoch.

        Args:
            stream: whose batches to give.
            workers: processes that decode; 0 decodes in this one.
            epoch: the number of the first one.
            exact: refuse to go on in an epoch that was dealt out otherwise; else such an epoch begins again.
            loop: Lightning's fit_loop, which knows how many of the batches it was given were trained on.
        """
        super().__init__(stream, workers)
        stream.start = torch.zeros(1 + max(1, workers), 2, dtype=torch.long).share_memory_()
        self.epoch, self.exact, self.loop = epoch, exact, loop
        self.start = self._beginning()
        # of the last batch, and of the one before: Lightning may be one behind
        self.states: deque[ResumeState] = deque(maxlen=2)
        self.ended = False

    def _beginning(self) -> ResumeState:
        return ResumeState(0, 0, [[0, 0] for _ in range(max(1, self.num_workers))])

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.dataset.start.copy_(torch.tensor([[self.epoch, self.start.turn], *self.start.places]))
        self.states.clear()
        self.states.append(self.start)
        self.start, self.epoch, self.ended = self._beginning(), self.epoch + 1, False
        for batch, worker, taken in super().__iter__():
            self.states.append(self.states[-1].after(worker, taken))
            yield batch
        self.ended = True

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, for all devices, each of which has to ask. Lightning keeps it in the checkpoint."""
        newest = self.states[-1] if self.states else self.start  # none: no batch was asked for yet
        lengths = self.dataset.batches, self.loop and self.loop.max_batches
        epoch_length = min((n for n in lengths if n is not None), default=inf)

        def ends(state: ResumeState) -> bool:
            return state.given >= epoch_length or (self.ended and state is newest)

        state = newest
        # Lightning sets batch_idx to -1 when it closes an epoch: then all of its batches were trained on
        closed = self.loop is not None and ends(newest) and self.loop.batch_idx < 0
        if self.loop is not None and self.states and not closed:
            trained = self.loop.batch_idx + 1  # Lightning may have asked for one batch more
            state = max((s for s in self.states if s.given <= trained), default=self.states[0])
        mine: dict[str, Any] = {"rank": self.dataset.rank, **state._asdict()}
        devices = [mine]
        if self.dataset.world > 1 and dist.is_initialized():
            devices = [{} for _ in range(self.dataset.world)]
            dist.all_gather_object(devices, mine)
        epoch = self.epoch - bool(self.states)
        return {"epoch": epoch, "whole": ends(state), "layout": self.layout(), "devices": devices}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches that were given of an epoch, or with the next one where it was at its end.

        Raises:
            UserError: in mid-epoch, and the epoch was dealt out to other workers or devices, or otherwise.
        """
        self.epoch, self.start = state["epoch"] + state.get("whole", False), self._beginning()
        self.ended = False
        self.states.clear()
        if state.get("whole"):
            return
        differs = self.differences(BEFORE | state.get("layout", {}))
        if not differs:
            mine = next(device for device in state["devices"] if device["rank"] == self.dataset.rank)
            self.start = ResumeState(mine["given"], mine["turn"], mine["places"])
            log.info("%d batches into epoch %d: their samples are read once more", self.start.given, self.epoch)
            return
        if self.exact:
            raise UserError(
                f"the checkpoint is from the middle of an epoch with {differs}: set that back to go on exactly, or begin "
                "the epoch again with --data.exact_resume false"
            )
        warnings.warn(f"the checkpoint is from the middle of an epoch with {differs}: the epoch begins again", stacklevel=2)

    def layout(self) -> dict[str, Any]:
        """All that the order of samples follows from, by the option that sets it."""
        return {"data.workers": self.num_workers, **self.dataset.layout()}

    def differences(self, then: dict[str, Any]) -> str:
        """How the order of samples was determined otherwise, in words; '' where it was not."""
        pairs = [(name, then.get(name, "unknown"), value) for name, value in self.layout().items()]
        return ", ".join(f"{name} {there} (now {here})" for name, there, here in pairs if there != here)


class WithTuples:
    """Batches of pairs that each bring a batch of tuples. Both loaders give as many, and stand at the same place."""

    def __init__(self, pairs: TrainLoader, tuples: TrainLoader) -> None:
        self.pairs = pairs
        self.tuples: Any = tuples  # whose batches are fromage.data.tuples.TupleBatch

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Batch]:
        for batch, tuples in zip(self.pairs, self.tuples, strict=True):
            yield batch._replace(tuples=tuples)

    def state_dict(self) -> dict[str, Any]:
        """As of the loader of pairs, with that of tuples in it."""
        return self.pairs.state_dict() | {"tuples": self.tuples.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where both stood. Raises UserError as TrainLoader does, and in an epoch that had no tuples."""
        self.pairs.load_state_dict(state)
        without = state | {"layout": {}}  # of an epoch without tuples: another layout than any, refused in mid-epoch
        self.tuples.load_state_dict(state.get("tuples", without))
