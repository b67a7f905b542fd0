"""The images of a folder or of shards, as a stream of tensors with locators and captions; an index is built from it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fromage.data.annotations import FILE, TEXT, coco_captions, kind_of, leave_out, problem, shown
from fromage.data.features import from_npy
from fromage.data.packing import PackReport, by_image, jsonl_pairs, tsv_pairs
from fromage.data.shards import expand, read_shard, shard_sizes
from fromage.data.workers import worker_share
from fromage.errors import BrokenSample, UserError
from fromage.images.codec import SUFFIXES, image_files, is_image
from fromage.images.transforms import Transform, read_image
from fromage.io import read_json

PAIRS = {".tsv": tsv_pairs, ".jsonl": jsonl_pairs}
FILES_PER_PART = 1024  # files of a folder per part; at most this many are encoded again after a kill


class Item(NamedTuple):
    """An image in an index: its path or locator for open_image, and its caption ('' if none)."""

    path: str
    caption: str = ""


class ImageSample(NamedTuple):
    """An image to be encoded. place: its number within its part."""

    place: int
    item: Item
    tensor: Tensor | None  # pixels (3, H, W), or stored features (m,)
    problem: str = ""  # why there is no tensor


class ImageBatch(NamedTuple):
    """Some images of a part, grouped by the shape of their tensors. number: of the batch within its part.

    The last batch of a part is empty and has last=True.
    """

    part: int
    number: int
    groups: list[tuple[Tensor | None, list[ImageSample]]]
    last: bool


Names = tuple[str, ...]  # names of a part: one shard, or some files
Members = dict[str, bytes]  # suffix -> bytes of one sample
OnLost = Callable[[str, str], None]  # is called with the name of a lost image and the cause
Reader = Callable[[Names, OnLost], Iterator[tuple[str, Members]]]  # part -> (locator, members) of its images


class ImageSource(IterableDataset[ImageBatch]):
    """The images of files or shards, in parts that are divided among the workers. A broken image is an ImageSample too.

    Attributes:
        parts: the parts; todo: the numbers of the parts that are read.
        count: expected number of images; None if unknown.
    """

    def __init__(self, parts: Sequence[Names], read: Reader, transform: Transform, count: int | None) -> None:
        self.parts, self.read, self.transform, self.count = parts, read, transform, count
        self.todo, self.batch_size = list(range(len(parts))), 64

    def digest(self) -> str:
        """16 hex digits that change with the names of the images or shards and with the division into parts."""
        return hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[ImageBatch]:
        worker, workers = worker_share()
        for part in self.todo[worker::workers]:
            yield from self.chunks(part, self.parts[part])

    def chunks(self, part: int, names: Names) -> Iterator[ImageBatch]:
        """The images of one part, in batches."""
        samples, number = self._samples(names), 0
        while batch := list(islice(samples, self.batch_size)):
            yield ImageBatch(part, number, collate(batch), False)
            number += 1
        yield ImageBatch(part, number, [], True)

    def _samples(self, part: Names) -> Iterator[ImageSample]:
        lost: list[str] = []
        for place, (locator, members) in enumerate(self.read(part, lambda name, cause: lost.append(f"{name}: {cause}"))):
            yield self._sample(place, locator, members)
        yield from (ImageSample(0, Item(""), None, problem) for problem in lost)

    def _sample(self, place: int, locator: str, members: Members) -> ImageSample:
        item = Item(locator, members.get("txt", b"").decode("utf-8", "replace").strip())
        try:
            return ImageSample(place, item, self._tensor(members))
        except BrokenSample as error:
            return ImageSample(place, item, None, f"{locator}: {error}")

    def _tensor(self, members: Members) -> Tensor:
        if "npy" in members:
            return from_npy(members["npy"]).float()  # (m,)
        suffix = next((suffix for suffix in SUFFIXES if suffix in members), None)
        if suffix is None:
            raise BrokenSample(f"holds no image; expected one of {', '.join(SUFFIXES)} or npy")
        return read_image(members[suffix], self.transform)  # (3, H, W)


def _read_files(part: Names, lost: OnLost, captions: dict[str, str]) -> Iterator[tuple[str, Members]]:
    for path in part:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            lost(path, f"cannot be read ({error.strerror})")
        else:
            yield path, {Path(path).suffix[1:].lower(): data, "txt": captions.get(path, "").encode("utf-8", "replace")}


def _read_shard(part: Names, lost: OnLost) -> Iterator[tuple[str, Members]]:
    (shard,) = part
    where = shard if ":" in shard else Path(shard).absolute()
    for sample in read_shard(shard, lost):
        yield f"{where}#{sample['__key__']}", {k: v for k, v in sample.items() if isinstance(v, bytes)}


def find_images(source: str, transform: Transform, captions: Path | None = None) -> ImageSource:
    """The images of a folder or of webdataset shards; embed_images describes the possible sources.

    Raises UserError if there are no images, and for a caption file that cannot be read or names none of them.
    """
    if is_shards(Path(source)):
        if any(map(is_image, Path(source).rglob("*"))):
            raise UserError(
                f"{source}: holds images and .tar shards; name the shards alone, {source}/*.tar, or move one of them"
            )
        if captions is not None:
            raise UserError(f"{source}: shards contain their captions; leave out {captions}")
        shards = expand(source)
        sizes = [size for size in shard_sizes(shards) if size is not None]
        return ImageSource(
            [(shard,) for shard in shards], _read_shard, transform, sum(sizes) if len(sizes) == len(shards) else None
        )
    folder = Path(source).absolute()
    files = [str(path) for path in image_files(folder)]
    if not files:
        raise UserError(f"{source}: holds neither images ({', '.join(SUFFIXES)}) nor .tar shards; name a folder that does")
    said = _read_captions(captions, folder) if captions else {}
    if captions and said.keys().isdisjoint(files):
        raise UserError(f"{captions}: names no image of {source}; names in it must be relative to that folder")
    parts = [tuple(files[start : start + FILES_PER_PART]) for start in range(0, len(files), FILES_PER_PART)]
    return ImageSource(parts, partial(_read_files, captions=said), transform, len(files))


def is_shards(source: Path) -> bool:
    """Whether a source is shards: a folder that contains some, or a name with .tar in it."""
    return any(source.glob("*.tar")) if source.is_dir() else ".tar" in str(source)


def _read_captions(path: Path, folder: Path) -> dict[str, str]:
    """File -> first caption, names relative to folder.

    From a TSV or JSON lines as they are packed, from {"a.jpg": "text" or ["text", ...]}, or from COCO's caption JSON.
    """
    if (read := PAIRS.get(path.suffix.lower())) and path.is_file():
        report = PackReport()
        rows = by_image(read(path, folder, report), report)
        lost = [f"{name}: {cause}" for cause, names in report.names.items() for name in names]
        leave_out(path, lost, len(lost) + sum(len(row.captions) for row in rows))
        return {os.path.normpath(row.image): row.captions[0] for row in rows}
    remedy = "a .tsv or .jsonl of captions, {file: caption} as JSON, or COCO's caption file"
    data = read_json(path, remedy)
    if kind_of(data) == "captions of COCO":
        files, captions = coco_captions(path, data)
        return {str(folder / files[key]): texts[0] for key, texts in captions.items() if texts}
    if not isinstance(data, dict):
        raise UserError(f"{path}: is {shown(data)}, not an object; name {remedy}")
    said = {name: texts if isinstance(texts, list) and texts else [texts] for name, texts in data.items()}
    odd = {name: cause for name, texts in said.items() if (cause := problem(name, FILE) or problem(texts[0], TEXT))}
    leave_out(path, [f"the caption of {shown(name)}{cause}" for name, cause in odd.items()], len(said))
    return {str(folder / name): texts[0] for name, texts in said.items() if name not in odd}


def collate(samples: list[ImageSample]) -> list[tuple[Tensor | None, list[ImageSample]]]:
    """Stack tensors of equal shape; returns each stack with its samples, whose own tensors are removed."""
    groups: dict[torch.Size | None, list[ImageSample]] = {}
    for sample in samples:
        groups.setdefault(None if sample.tensor is None else sample.tensor.shape, []).append(sample)
    return [_stacked(group) for group in groups.values()]


def _stacked(group: list[ImageSample]) -> tuple[Tensor | None, list[ImageSample]]:
    tensors = [s.tensor for s in group if s.tensor is not None]
    return torch.stack(tensors) if tensors else None, [s._replace(tensor=None) for s in group]
