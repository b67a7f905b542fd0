"""The pictures of a folder or of shards as a stream of tensors, each with its locator and caption."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fromage.errors import BrokenSample, UserError
from fromage.features import from_npy
from fromage.pictures import SUFFIXES, decode_picture, is_picture
from fromage.shards import expand, read_shard, shard_sizes


class Item(NamedTuple):
    """A picture in an index: where open_picture finds it, and what is said of it ('' if nothing)."""

    path: str
    caption: str = ""


class Sample(NamedTuple):
    """A picture of a PictureSource. order: (file or shard, place in it), as workers deliver in turns."""

    order: tuple[int, int]
    item: Item
    tensor: Tensor | None  # pixels (3, H, W), or stored features (m,)
    problem: str = ""  # why there is no tensor


Members = dict[str, bytes]  # suffix -> bytes, of one sample
Lost = Callable[[str, str], None]  # takes the name of what is lost, and the cause
Reader = Callable[[str, Lost], Iterator[tuple[str, Members]]]  # file or shard -> (locator, members) of its pictures


class PictureSource(IterableDataset):
    """The pictures of files or shards, which are dealt out among the workers. What is broken becomes a Sample too.

    Attributes:
        count: how many there should be; None if unknown.
    """

    def __init__(
        self, parts: Sequence[str], read: Reader, transform: Callable[[Image.Image], Tensor], count: int | None
    ) -> None:
        self.parts, self.read, self.transform, self.count = parts, read, transform, count

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, len(self.parts), step):
            yield from self._part(number, self.parts[number])

    def _part(self, number: int, part: str) -> Iterator[Sample]:
        lost: list[str] = []
        for place, (locator, members) in enumerate(self.read(part, lambda name, cause: lost.append(f"{name}: {cause}"))):
            yield self._sample((number, place), locator, members)
        yield from (Sample((number, 0), Item(part), None, problem) for problem in lost)

    def _sample(self, order: tuple[int, int], locator: str, members: Members) -> Sample:
        item = Item(locator, members.get("txt", b"").decode("utf-8", "replace").strip())
        try:
            return Sample(order, item, self._tensor(members))
        except BrokenSample as error:
            return Sample(order, item, None, f"{locator}: {error}")

    def _tensor(self, members: Members) -> Tensor:
        if "npy" in members:
            return from_npy(members["npy"]).float()  # (m,)
        suffix = next((suffix for suffix in SUFFIXES if suffix in members), None)
        if suffix is None:
            raise BrokenSample(f"holds no picture; expected one of {', '.join(SUFFIXES)} or npy")
        return self.transform(decode_picture(members[suffix]))  # (3, H, W)


def _read_file(path: str, lost: Lost, captions: dict[str, str]) -> Iterator[tuple[str, Members]]:
    try:
        yield path, {Path(path).suffix[1:].lower(): Path(path).read_bytes(), "txt": captions.get(path, "").encode()}
    except OSError as error:
        lost(path, f"cannot be read ({error.strerror})")


def _read_shard(shard: str, lost: Lost) -> Iterator[tuple[str, Members]]:
    where = shard if ":" in shard else Path(shard).absolute()
    for sample in read_shard(shard, lost):
        yield f"{where}#{sample['__key__']}", {k: v for k, v in sample.items() if isinstance(v, bytes)}


def find_pictures(source: str, transform: Callable[[Image.Image], Tensor], captions: Path | None = None) -> PictureSource:
    """The pictures of a folder or of webdataset shards; embed_pictures says what a source may be.

    Raises UserError where neither is there, and for captions that cannot be read or name none of the pictures.
    """
    if _is_shards(Path(source)):
        if captions is not None:
            raise UserError(f"{source}: shards bring their captions along; leave out {captions}")
        shards = expand(source)
        sizes = [size for size in shard_sizes(shards) if size is not None]
        return PictureSource(shards, _read_shard, transform, sum(sizes) if len(sizes) == len(shards) else None)
    folder = Path(source).absolute()
    files = [str(path) for path in sorted(folder.rglob("*")) if is_picture(path) and path.is_file()]
    if not files:
        raise UserError(f"{source}: holds neither pictures ({', '.join(SUFFIXES)}) nor .tar shards; name a folder that does")
    said = _read_captions(captions, folder) if captions else {}
    if captions and said.keys().isdisjoint(files):
        raise UserError(f"{captions}: names no picture of {source}; names in it must be relative to that folder")
    return PictureSource(files, partial(_read_file, captions=said), transform, len(files))


def _is_shards(source: Path) -> bool:
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
