"""The images of a folder or of shards as a stream of tensors, each with its locator and caption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fromage.data.features import from_npy
from fromage.data.shards import expand, read_shard, shard_sizes
from fromage.data.workers import worker_share
from fromage.errors import BrokenSample, UserError
from fromage.images.codec import SUFFIXES, is_image
from fromage.images.transforms import Transform, read_image

FILES_PER_PART = 1024  # of a folder; what a kill can cost


class Item(NamedTuple):
    """An image in an index: where open_image finds it, and what is said of it ('' if nothing)."""

    path: str
    caption: str = ""


class Sample(NamedTuple):
    """An image on its way to the tower. place: among those of its part."""

    place: int
    item: Item
    tensor: Tensor | None  # pixels (3, H, W), or stored features (m,)
    problem: str = ""  # why there is no tensor


class Chunk(NamedTuple):
    """Some images of a part, grouped by the shape of their tensors; the last of a part says so. number: in the part."""

    part: int
    number: int
    groups: list[tuple[Tensor | None, list[Sample]]]
    last: bool


Names = tuple[str, ...]  # of a part: one shard, or some files
Members = dict[str, bytes]  # suffix -> bytes, of one sample
Lost = Callable[[str, str], None]  # takes the name of what is lost, and the cause
Reader = Callable[[Names, Lost], Iterator[tuple[str, Members]]]  # part -> (locator, members) of its images


class ImageSource(IterableDataset[Chunk]):
    """The images of files or shards, in parts which are dealt out among the workers. What is broken becomes a Sample too.

    Attributes:
        parts: what the images come in; todo are the numbers of those that are read.
        count: how many images there should be; None if unknown.
    """

    def __init__(self, parts: Sequence[Names], read: Reader, transform: Transform, count: int | None) -> None:
        self.parts, self.read, self.transform, self.count = parts, read, transform, count
        self.todo, self.batch_size = list(range(len(parts))), 64

    def digest(self) -> str:
        """Changes with the names of the images or shards, and with how they are parted."""
        return hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[Chunk]:
        worker, workers = worker_share()
        for part in self.todo[worker::workers]:
            yield from self.chunks(part, self.parts[part])

    def chunks(self, part: int, names: Names) -> Iterator[Chunk]:
        """The images of one part, of these names, batch by batch."""
        samples, number = self._samples(names), 0
        while batch := list(islice(samples, self.batch_size)):
            yield Chunk(part, number, collate(batch), False)
            number += 1
        yield Chunk(part, number, [], True)

    def _samples(self, part: Names) -> Iterator[Sample]:
        lost: list[str] = []
        for place, (locator, members) in enumerate(self.read(part, lambda name, cause: lost.append(f"{name}: {cause}"))):
            yield self._sample(place, locator, members)
        yield from (Sample(0, Item(""), None, problem) for problem in lost)

    def _sample(self, place: int, locator: str, members: Members) -> Sample:
        item = Item(locator, members.get("txt", b"").decode("utf-8", "replace").strip())
        try:
            return Sample(place, item, self._tensor(members))
        except BrokenSample as error:
            return Sample(place, item, None, f"{locator}: {error}")

    def _tensor(self, members: Members) -> Tensor:
        if "npy" in members:
            return from_npy(members["npy"]).float()  # (m,)
        suffix = next((suffix for suffix in SUFFIXES if suffix in members), None)
        if suffix is None:
            raise BrokenSample(f"holds no image; expected one of {', '.join(SUFFIXES)} or npy")
        return read_image(members[suffix], self.transform)  # (3, H, W)


def _read_files(part: Names, lost: Lost, captions: dict[str, str]) -> Iterator[tuple[str, Members]]:
    for path in part:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            lost(path, f"cannot be read ({error.strerror})")
        else:
            yield path, {Path(path).suffix[1:].lower(): data, "txt": captions.get(path, "").encode("utf-8", "replace")}


def _read_shard(part: Names, lost: Lost) -> Iterator[tuple[str, Members]]:
    (shard,) = part
    where = shard if ":" in shard else Path(shard).absolute()
    for sample in read_shard(shard, lost):
        yield f"{where}#{sample['__key__']}", {k: v for k, v in sample.items() if isinstance(v, bytes)}


def find_images(source: str, transform: Transform, captions: Path | None = None) -> ImageSource:
    """The images of a folder or of webdataset shards; embed_images says what a source may be.

    Raises UserError where neither is there, and for captions that cannot be read or name none of the images.
    """
    if is_shards(Path(source)):
        if any(map(is_image, Path(source).rglob("*"))):
            raise UserError(f"{source}: holds images and .tar shards; name the shards alone, {source}/*.tar, or part them")
        if captions is not None:
            raise UserError(f"{source}: shards bring their captions along; leave out {captions}")
        shards = expand(source)
        sizes = [size for size in shard_sizes(shards) if size is not None]
        return ImageSource(
            [(shard,) for shard in shards], _read_shard, transform, sum(sizes) if len(sizes) == len(shards) else None
        )
    folder = Path(source).absolute()
    files = [str(path) for path in sorted(folder.rglob("*")) if is_image(path) and path.is_file()]
    if not files:
        raise UserError(f"{source}: holds neither images ({', '.join(SUFFIXES)}) nor .tar shards; name a folder that does")
    said = _read_captions(captions, folder) if captions else {}
    if captions and said.keys().isdisjoint(files):
        raise UserError(f"{captions}: names no image of {source}; names in it must be relative to that folder")
    parts = [tuple(files[start : start + FILES_PER_PART]) for start in range(0, len(files), FILES_PER_PART)]
    return ImageSource(parts, partial(_read_files, captions=said), transform, len(files))


def is_shards(source: Path) -> bool:
    """Whether a source means shards: a folder that holds some, or a name with .tar in it."""
    return any(source.glob("*.tar")) if source.is_dir() else ".tar" in str(source)


def _read_captions(path: Path, folder: Path) -> dict[str, str]:
    """File -> first caption, from {"a.jpg": "text" or ["text", ...]} or COCO's caption JSON, names relative to folder."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if "annotations" in data:
            names = {image["id"]: image["file_name"] for image in data["images"]}
            pairs = [(names[a["image_id"]], a["caption"]) for a in data["annotations"]]
        else:
            pairs = [(name, text if isinstance(text, str) else text[0]) for name, text in data.items()]
        return {str(folder / name): text for name, text in reversed(pairs)}  # reversed: the first caption stays
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no caption file ({error!r}); give {{file: caption}} or COCO's caption JSON") from error


def collate(samples: list[Sample]) -> list[tuple[Tensor | None, list[Sample]]]:
    """Stack the tensors of equal shape; the samples come back beside them, without theirs."""
    groups: dict[torch.Size | None, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(None if sample.tensor is None else sample.tensor.shape, []).append(sample)
    return [_stacked(group) for group in groups.values()]


def _stacked(group: list[Sample]) -> tuple[Tensor | None, list[Sample]]:
    tensors = [s.tensor for s in group if s.tensor is not None]
    return torch.stack(tensors) if tensors else None, [s._replace(tensor=None) for s in group]
