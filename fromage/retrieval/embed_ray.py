"""Embedding images as a Ray Data job: for more of them than one machine reads in the time there is.

    parts -> read: one task per part, on any core   -> chunks of decoded images
          -> embed: actors that hold the vision tower -> chunks of rows, a kilobyte per image
          -> this process, which stores each part when it is whole

Ray runs a task again whose worker or node is lost, and starts an actor again that died. What is stored are the parts of
fromage.retrieval.embedding_store: a job that was killed goes on with those that are missing, here or without Ray.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fromage.data.image_source import ImageSource
from fromage.distribution import pip_install
from fromage.errors import UserError, first_line
from fromage.retrieval.embed_images import Done, embed_chunk

if TYPE_CHECKING:
    import ray.data

    from fromage.models.fromage import Fromage

SECONDS = 10.0  # to be reached in
Row = dict[str, bytes]  # what Ray carries: one value, pickled, so that neither names nor shapes are changed on the way


class ImageSide(nn.Module):
    """The half of a model that embeds images; the language model stays where it is."""

    def __init__(self, model: Fromage) -> None:
        super().__init__()
        self.vision, self.image_head, self._embed_images = model.vision, model.image_head, type(model).embed_images

    def embed_images(self, features: Tensor) -> Tensor:
        """As of the model."""
        return self._embed_images(self, features)  # type: ignore[arg-type]  # of the model it needs what is here

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.image_head.weight.device


@dataclass(frozen=True)
class RayJob:
    """How much of a Ray cluster a job takes. Its machines have fromage and see the images by the same names.

    Attributes:
        address: 'auto' or ray://host:port of a cluster; 'local' starts Ray on this machine, for this job.
        actors: copies of the vision tower.
        gpus: of each actor, also a fraction of one; 0 embeds on a core.
        readers: tasks that read and decode at a time; 0 is one per core that is free.
    """

    address: str = "local"
    actors: int = 1
    gpus: float = 0
    readers: int = 0

    def embed(self, model: Fromage, images: ImageSource) -> Iterator[Done]:
        """Embed the parts to do, in any order. Raises UserError where Ray is missing, away, or has not what is asked for."""
        if not images.todo:
            return
        with _plain_errors(), self._cluster():
            for row in self._job(model, images).iter_rows():
                done = _unpacked(row)
                if isinstance(done, UserError):
                    raise done
                yield done

    def _job(self, model: Fromage, images: ImageSource) -> ray.data.Dataset:
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False  # ours is there already
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        parts = [_packed((part, images.parts[part])) for part in images.todo]
        tower, device = ray.put(ImageSide(model)), "cuda" if self.gpus else "cpu"
        readers = ray.data.TaskPoolStrategy(size=self.readers or None)
        actors = ray.data.ActorPoolStrategy(size=self.actors)
        read = ray.data.from_items(parts, override_num_blocks=len(parts)).flat_map(_reader(images), compute=readers)
        return read.map(
            Embedder,  # type: ignore[arg-type]  # Ray makes one of it per actor
            fn_constructor_args=([tower], device),
            compute=actors,
            num_cpus=0 if self.gpus else 1,
            num_gpus=self.gpus or None,
        )

    @contextmanager
    def _cluster(self) -> Iterator[None]:
        """Within Ray: one that is there already, or else the one at the address."""
        import ray

        if ray.is_initialized():
            self._check(ray.cluster_resources())
            yield
            return
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if self.address == "local":
            quiet |= {"num_cpus": max(os.cpu_count() or 1, 1 + self.actors), "include_dashboard": False}
        else:
            _reach(self.address)
        try:
            ray.init(self.address, **quiet)
        except Exception as error:
            cause = first_line(error)
            raise UserError(f"ray at {self.address}: cannot be had ({cause}); the same command tries it again") from error
        try:
            self._check(ray.cluster_resources())
            yield
        finally:
            ray.shutdown()

    def _check(self, has: dict[str, float]) -> None:
        """Raise UserError for what Ray would wait for in vain."""
        cores, gpus = has.get("CPU", 0), has.get("GPU", 0)
        if self.gpus * self.actors > gpus:
            raise UserError(
                f"ray has {gpus:g} GPUs, not {self.gpus * self.actors:g}; ask for fewer actors, or less of a GPU"
            )
        if not self.gpus and self.actors >= cores:
            raise UserError(f"ray has {cores:g} cores, of which {self.actors} actors leave none to read; ask for fewer")


def _reach(address: str) -> None:
    """Raise UserError for an address where nothing listens: Ray would try for minutes, and then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit():
        raise UserError(f"ray at {address}: is no address; give auto, or the host:port that `ray start` prints")
    try:
        socket.create_connection((host, int(port)), SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"ray at {address}: nothing answers there ({error}); see that the cluster runs") from error


class Embedder:
    """Holds the vision tower, and embeds chunk after chunk."""

    def __init__(self, tower: list[ray.ObjectRef], device: str) -> None:
        """tower: within a list, so that Ray does not fetch it for an actor's description."""
        import ray

        self.model = ray.get(tower[0]).to(device)

    def __call__(self, row: Row) -> Row:
        """A chunk of images to one of rows, or to what is wrong with it: Ray would wrap it in its own errors."""
        chunk = _unpacked(row)
        try:
            return _packed(chunk if isinstance(chunk, UserError) else embed_chunk(self.model, chunk))
        except UserError as error:
            return _packed(error)


def _reader(images: ImageSource) -> Callable[[Row], Iterator[Row]]:
    """What reads a part."""
    import ray

    source = ray.put(images.only([], [], None))  # each task gets its own part

    def read(row: Row) -> Iterator[Row]:
        try:
            yield from map(_packed, ray.get(source).chunks(*_unpacked(row)))
        except UserError as error:
            yield _packed(error)

    return read


def _packed(value: Any) -> Row:
    return {"pickled": pickle.dumps(value, protocol=5)}


def _unpacked(row: Row) -> Any:
    return pickle.loads(row["pickled"])


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise UserError for what Ray has not or cannot; failures of the program stay what they are."""
    try:
        from ray.exceptions import RayError, RayTaskError
    except ImportError as error:
        raise UserError(f"a Ray job needs Ray: {pip_install('ray')}") from error
    try:
        yield
    except RayTaskError:
        raise
    except (RayError, ConnectionError) as error:
        raise UserError(f"ray: {first_line(error)}; the same command goes on where it was") from error
