"""The images of a folder or of shards, as a stream of tensors with locators and captions; an index is built from it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fromage.data.caption_files import read_captions
from fromage.data.sample_images import read_images
from fromage.data.shard_names import expand
from fromage.data.shard_sizes import sized, total
from fromage.data.shards import UNREAD, Raw, captions_of, read_shard
from fromage.data.workers import worker_share
from fromage.errors import BrokenSample, UserError, reason
from fromage.images.codec import SUFFIXES, image_files, is_image
from fromage.images.locators import locator
from fromage.images.open import MAX_FILE, open_regular
from fromage.images.transforms import Transform
from fromage.io import json_object

MAX_META = 1 << 14  # bytes of what is kept of an image's own JSON
PATHS = ("source", "target_image")  # of what fromage.data.packing writes: as they stood in the list of images
FILES_PER_PART = 1024  # files of a folder per part; at most this many are encoded again after a kill


class Item(NamedTuple):
    """An image in an index, as texts.

    Attributes:
        path: its path or locator for open_image.
        caption: '' if none.
        meta: what else is known of it, a JSON object; '' if nothing.
        stamp: its file as it was embedded, see FileStamp; '' if not known.
    """

    path: str
    caption: str = ""
    meta: str = ""
    stamp: str = ""


class FileStamp(NamedTuple):
    """A file as it was read: bytes, time of its last change in ns, and digest of the content ('' if not taken)."""

    size: int
    changed: int
    digest: str = ""

    @classmethod
    def of(cls, about: os.stat_result, data: bytes | None = None) -> FileStamp:
        """The stamp of a file from what the system says of it, and its content."""
        return cls(about.st_size, about.st_mtime_ns, "" if data is None else cls.digest_of(data))

    @classmethod
    def at(cls, path: str | Path) -> FileStamp | None:
        """The stamp of a file as it is now, without a digest; None where there is none."""
        try:
            return cls.of(os.stat(path))  # noqa: PTH116 (a shard's name may be an address)
        except (OSError, ValueError):  # ValueError: a null byte, or half a character
            return None

    @staticmethod
    def digest_of(data: bytes) -> str:
        """32 hex digits of a file's content."""
        return hashlib.sha256(data).hexdigest()[:32]

    @classmethod
    def read(cls, text: str) -> FileStamp | None:
        """The stamp that str() made; None for other text."""
        try:
            size, changed, digest = text.split(" ")
            return cls(int(size), int(changed), digest)
        except ValueError:
            return None

    def __str__(self) -> str:
        return f"{self.size} {self.changed} {self.digest}"


class ImageSample(NamedTuple):
    """An image to be encoded. place: its number within its part."""

    place: int
    item: Item
    tensor: Tensor | None  # pixels (3, H, W), or stored features (m,)
    problem: str = ""  # why there is no tensor


class ImageBatch(NamedTuple):
    """Some images of a part, grouped by the shape of their tensors. number: of the batch within its part.

    The last batch of a part is empty, has last=True, and the stamps of the part's files or shards as they were read.
    """

    part: int
    number: int
    groups: list[tuple[Tensor | None, list[ImageSample]]]
    last: bool
    stamps: dict[str, str]  # by name


Names = tuple[str, ...]  # names of a part: one shard, or some files
Members = dict[str, bytes]  # suffix -> bytes of one sample
OnLost = Callable[[str, str, str], None]  # of what is lost: its file or shard, its name for people, the cause
Reader = Callable[[Names, OnLost], Iterator[tuple[Item, Members]]]  # part -> item and members of each of its images


class ImageSource(IterableDataset[ImageBatch]):
    """The images of files or shards, in parts that are divided among the workers. A broken image is an ImageSample too.

    Attributes:
        parts: the parts; todo: the numbers of the parts that are read, at first all.
        count: expected number of images; None if unknown.
        captions: of files, by path; None for shards, which contain theirs.
    """

    captions: Mapping[str, str] | None = None

    def __init__(
        self,
        names: Sequence[str],
        read: Reader,
        transform: Transform,
        count: int | None,
        root: str = "",
        per_part: int = 1,
        batch_size: int = 64,
    ) -> None:
        """names: files or shards; root: folder that they are in, '' for none; per_part: names of a part, at most."""
        self.read, self.transform, self.count, self.root = read, transform, count, root
        self.per_part, self.batch_size = per_part, batch_size
        self.parts = self.parts_of(names)
        self.todo = list(range(len(self.parts)))

    def only(self, parts: Sequence[Names], todo: Sequence[int], count: int | None) -> ImageSource:
        """The same kind of source with other parts; todo and count as of the class."""
        other = copy.copy(self)
        other.parts, other.todo, other.count = list(parts), list(todo), count
        return other

    def parts_of(self, names: Sequence[str]) -> list[Names]:
        """Names divided into parts."""
        return [tuple(names[start : start + self.per_part]) for start in range(0, len(names), self.per_part)]

    def stamp(self, name: str) -> str:
        """The stamp of a file or shard as it is now, without a digest; UNREAD where it may not be read; '' for no file."""
        at = FileStamp.at(name)
        return UNREAD if at and not os.access(name, os.R_OK) else str(at or "")

    def goes_on(self, root: str | None, names: Set[str]) -> bool:
        """Whether this source may be one that has changed since. root, names: the folder and the files or shards it had.

        A folder of shards may hold several sources, so that shards must have one in common with those before.
        """
        now = {name for part in self.parts for name in part}
        if self.captions is None and names and now.isdisjoint(names):
            return False
        return root == self.root or names <= now

    def digest(self) -> str:
        """16 hex digits that change with the names of the images or shards and with the division into parts."""
        return hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[ImageBatch]:
        worker, workers = worker_share()
        for part in self.todo[worker::workers]:
            yield from self.chunks(part, self.parts[part])

    def chunks(self, part: int, names: Names) -> Iterator[ImageBatch]:
        """The images of one part, in batches."""
        stamps = {name: self.stamp(name) for name in names}  # before they are read: a copy may still be under way
        samples, number = self._samples(names, stamps), 0
        while batch := list(islice(samples, self.batch_size)):
            yield ImageBatch(part, number, collate(batch), False, {})
            number += 1
        yield ImageBatch(part, number, [], True, stamps)

    def _samples(self, part: Names, stamps: dict[str, str]) -> Iterator[ImageSample]:
        """The images of a part. What could not be read gets the stamp UNREAD."""
        lost: list[str] = []

        def on_lost(name: str, shown: str, cause: str) -> None:
            lost.append(f"{shown}: {cause}")
            if cause.startswith(UNREAD):
                stamps[name] = UNREAD

        for place, (item, members) in enumerate(self.read(part, on_lost)):
            if stamp := FileStamp.read(item.stamp):
                stamps[item.path] = str(stamp._replace(digest=""))
            yield self._sample(place, item, members)
        yield from (ImageSample(0, Item(""), None, problem) for problem in lost)

    def _sample(self, place: int, item: Item, members: Members) -> ImageSample:
        try:
            pixels, features = read_images(members, self.transform)
        except BrokenSample as error:
            return ImageSample(place, item, None, f"{item.path}: {error}")
        return ImageSample(place, item, pixels if features is None else features.float())  # (3, H, W) or (m,)


def _read_files(part: Names, lost: OnLost, captions: dict[str, str]) -> Iterator[tuple[Item, Members]]:
    for path in part:
        try:
            with open_regular(Path(path)) as file:
                about = os.fstat(file.fileno())
                data = file.read(MAX_FILE)
        except OSError as error:
            lost(path, path, f"{UNREAD}: {reason(error)}")
        else:
            item = Item(path, captions.get(path, ""), "", str(FileStamp.of(about, data)))
            yield item, {Path(path).suffix[1:].lower(): data}


def _read_shard(part: Names, lost: OnLost) -> Iterator[tuple[Item, Members]]:
    for shard in part:
        for sample in read_shard(shard, partial(lost, shard)):
            members = {k: v for k, v in sample.items() if isinstance(v, bytes)}
            yield Item(locator(shard, sample["__key__"]), _caption(sample), _meta(members.get("json", b""))), members


def _caption(sample: Raw) -> str:
    """A sample's first caption, as training reads it; '' where there is none."""
    try:
        return captions_of(sample)[0]
    except BrokenSample:
        return ""


def _meta(data: bytes) -> str:
    """What a shard says of an image, compact; '' for what is no JSON object, and for more than MAX_META bytes."""
    found = json_object(data) if len(data) <= MAX_META else {}
    if not found:
        return ""
    return json.dumps(without_folders(found), ensure_ascii=False).encode("utf-8", "replace").decode()


def without_folders(found: dict[str, Any]) -> dict[str, Any]:
    """What a shard says of an image; of absolute paths on the machine that packed it the file's name alone."""
    paths = {name: value for name, value in found.items() if name in PATHS and isinstance(value, str)}
    return found | {name: os.path.basename(path) for name, path in paths.items() if os.path.isabs(path)}  # noqa: PTH117, PTH119


def find_images(source: str, transform: Transform, captions: Path | None = None, batch_size: int = 64) -> ImageSource:
    """The images of a folder or of webdataset shards; embed_images describes the possible sources.

    Raises UserError if there are no images, and for a caption file that cannot be read or names none of them.
    """
    if is_shards(Path(source)):
        if any(is_image(path) for path in Path(source).glob("*")):
            raise UserError(
                f"{source}: holds images and .tar shards; name the shards alone, {source}/*.tar, or move one of them"
            )
        if captions is not None:
            raise UserError(f"{source}: shards contain their captions; leave out {captions}")
        shards = [shard if is_absolute(shard) else str(Path(shard).absolute()) for shard in expand(source)]
        folders = [str(Path(shard).parent) for shard in shards if ":" not in shard]
        root = os.path.commonpath(folders) if folders else ""
        return ImageSource(shards, _read_shard, transform, total(sized(shards)), root, batch_size=batch_size)
    folder = Path(source).absolute()
    files = [str(path) for path in image_files(folder)]
    if not files:
        raise UserError(f"{source}: holds neither images ({', '.join(SUFFIXES)}) nor .tar shards; name a folder that does")
    said = read_captions(captions, folder) if captions else {}
    if captions and said.keys().isdisjoint(files):
        raise UserError(f"{captions}: names no image of {source}; names in it must be relative to that folder")
    read = partial(_read_files, captions=said)
    images = ImageSource(files, read, transform, len(files), str(folder), FILES_PER_PART, batch_size)
    images.captions = said
    return images


def is_absolute(name: str) -> bool:
    """Whether the name of a file or shard is the same in every folder: an absolute path, an address or a command."""
    return ":" in name or Path(name).is_absolute()


def is_shards(source: Path) -> bool:
    """Whether a source is shards: a folder that contains some, or a name with .tar in it."""
    return any(source.glob("*.tar")) if source.is_dir() else ".tar" in str(source)


def collate(samples: list[ImageSample]) -> list[tuple[Tensor | None, list[ImageSample]]]:
    """Stack tensors of equal shape; returns each stack with its samples, whose own tensors are removed."""
    groups: dict[torch.Size | None, list[ImageSample]] = {}
    for sample in samples:
        groups.setdefault(None if sample.tensor is None else sample.tensor.shape, []).append(sample)
    return [_stacked(group) for group in groups.values()]


def _stacked(group: list[ImageSample]) -> tuple[Tensor | None, list[ImageSample]]:
    tensors = [s.tensor for s in group if s.tensor is not None]
    return torch.stack(tensors) if tensors else None, [s._replace(tensor=None) for s in group]
