"""An index brought up to date with its folder: what is new is added, what has changed is embedded again, what is gone goes.

A file has changed where its content has: size and time of change are looked at first, then a digest. What is embedded is
kept beside the index until the index is written, so that a run which was killed goes on where it was. Files that are no
images are remembered in index.json with size and time of change, and tried again once these differ.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from fromage.checks import ADDRESSES
from fromage.data.caption_files import read_captions
from fromage.data.image_source import FileStamp, Item, find_images, is_shards
from fromage.errors import UserError, reason
from fromage.images.codec import image_files
from fromage.images.locators import split_locator
from fromage.images.open import read_file
from fromage.locks import held
from fromage.models.fromage import Fromage
from fromage.retrieval.base import ImageIndex
from fromage.retrieval.build import unit_rows
from fromage.retrieval.embed_images import absolute_checkpoint, embed_source
from fromage.retrieval.embedding_store import EmbeddingStore
from fromage.retrieval.image_root import ImageRoot, to_bytes
from fromage.retrieval.index_folder import read_about
from fromage.retrieval.item_table import Embedded, ItemTable, to_batch
from fromage.retrieval.open_index import load_index
from fromage.retrieval.trust import is_sealed, secret

UNDECODABLE = "undecodable image"


class Synced(NamedTuple):
    """What a sync did, in images. broken: those that cannot be read, a line each; they are not in the index."""

    new: int
    changed: int
    deleted: int
    unchanged: int
    broken: list[str]

    def __str__(self) -> str:
        left = f", {len(self.broken):,} left out" if self.broken else ""
        return f"{self.new:,} new, {self.changed:,} changed, {self.deleted:,} deleted, {self.unchanged:,} unchanged{left}"


@dataclass
class _Difference:
    """Paths, by what became of their files.

    changed: the caption of each. touched: the item that is to stand in place of one whose content is the same.
    """

    new: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    touched: dict[str, Item] = field(default_factory=dict)
    same: int = 0
    strange: int = 0  # files that are named and not in the folder


def sync(
    folder: str | Path,
    images: str | Path,
    load: Callable[[], Fromage],
    *,
    captions: str | Path | None = None,
    checkpoint: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
) -> tuple[ImageIndex, Synced]:
    """Bring the index in a folder up to date with a folder of images, where its images are from then on.

    The folder may be the one that the index was built from, a part of it, one around it, or the same images elsewhere. Rows
    at addresses and in shards stay as they are. Images of an index without stamps, of a former version, are embedded again.

    Args:
        load: gives the model that built the index; called where there is something to embed.
        captions: as for embed_images; captions that differ are taken over, and images that it does not name keep theirs.
        checkpoint: where the model is now. An index from elsewhere, which is one that was built here from then on, names
            this one, or none: what a stranger named is not believed.

    Raises:
        UserError: the folder holds no image, or none of those that the index names in it.
    """
    folder, where = Path(folder).resolve(), Path(images).absolute()
    if not where.is_dir() or is_shards(where):
        raise UserError(f"{images}: is no folder of images; shards are added with: fromage index embed, fromage index add")
    with held(folder, beside=True):
        return _synced(folder, where, load, captions, checkpoint, batch_size, workers)


def _synced(
    folder: Path,
    where: Path,
    load: Callable[[], Fromage],
    captions: str | Path | None,
    checkpoint: str | Path | None,
    batch_size: int,
    workers: int,
) -> tuple[ImageIndex, Synced]:
    """As sync, while no other process writes the index."""
    index, root = _rooted(folder, where)
    said = read_captions(Path(captions), where) if captions else {}
    found = _difference(index, where, said)
    if found.deleted and not found.same and not found.touched and not found.changed:
        raise UserError(f"{folder}: none of its images is in {where}; name their folder, or build one: fromage index build")
    if not found.strange:  # all files that it names were found here
        if not index.place.own and secret() is not None:  # it is to be sealed
            index.checkpoint = absolute_checkpoint(checkpoint)
        index.set_place(replace(index.place, own=True, confined=False))
    known = _known(index, found.new)
    broken = [f"{path}: {cause}" for path, (_, cause) in known.items()]
    bad: dict[str, str] = {}
    odd: dict[str, str] = {}
    fresh: list[Iterator[Embedded]] = []
    beside = folder.with_name(f".{folder.name}.{index.fingerprint}.sync")
    if todo := sorted({*found.new, *found.changed} - known.keys()):
        was = {path: _stamp(path) for path in todo}  # before they are read
        store = _embed(index, todo, where, load, captions, beside, batch_size, workers)
        bad, fresh = _bad(store.broken(), {*todo}), [_captioned(unit_rows(store), found.changed)]
        broken += store.broken()
        odd = _remembered(bad, was, root)
    gone = [*found.deleted, *found.changed, *found.touched]
    index.set_place(replace(index.place, left_out={_key(path, root): " ".join(said) for path, said in known.items()} | odd))
    if gone or len(todo) > len(bad) or odd or _stale(folder, index, root):
        rows = chain(_touched(index, found.touched), *fresh)
        index = index.change(folder, pa.array([to_bytes(path) for path in gone], pa.binary()), rows, root)
    shutil.rmtree(beside, ignore_errors=True)
    new, changed = (sum(path not in bad | known for path in paths) for paths in (found.new, found.changed))
    return index, Synced(new, changed, len(found.deleted), found.same + len(found.touched), broken)


def _rooted(folder: Path, where: Path) -> tuple[ImageIndex, ImageRoot]:
    """The index with its images in the folder `where`, and what its paths are to be relative to."""
    index, prefix = load_index(folder), os.fsencode(where).rstrip(b"/") + b"/"
    if any(path.startswith(prefix) for chunk in index.paths().chunks for path in chunk.to_pylist()):  # not moved
        root = index.root.path
        return index, ImageRoot(root if root and where.is_relative_to(root) else str(where))
    return load_index(folder, images=where), ImageRoot(str(where))


def _difference(index: ImageIndex, where: Path, said: dict[str, str]) -> _Difference:
    """How the files of a folder differ from what an index was made of; said: captions by file."""
    files, found, seen = dict.fromkeys(map(str, image_files(where))), _Difference(), set[str]()
    if not files:
        raise UserError(f"{where}: holds no images; name the folder of the images")
    within = f"{where}{os.sep}"
    for _, batch in index.rows():
        for item in ItemTable([batch]):
            if item.path in files:
                seen.add(item.path)
                _compare(item, said.get(item.path, item.caption), found)
            elif not item.path.startswith(ADDRESSES):
                inside = item.path.startswith(within) and split_locator(item.path)[1] is None
                found.strange += not inside
                if inside:
                    _check_gone(item.path)
                    found.deleted.append(item.path)
    found.new = [path for path in files if path not in seen]
    return found


def _check_gone(path: str) -> None:
    """Raise UserError for an image that is not listed and may be there all the same, in a folder that is closed to us."""
    try:
        there = stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116 (a name in an index may hold half a character)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be looked for ({reason(error)}); see to its permissions") from error
    if there:
        raise UserError(f"{path}: its folder cannot be listed; see to its permissions")


def _compare(item: Item, caption: str, found: _Difference) -> None:
    """Put an image where it belongs."""
    known = FileStamp.read(item.stamp)
    if not (now := FileStamp.at(item.path)):  # it went since it was listed
        found.deleted.append(item.path)
    elif known and known[:2] == now[:2] and caption == item.caption:
        found.same += 1
    elif known and (known[:2] == now[:2] or _digest(item.path) == known.digest):
        found.touched[item.path] = item._replace(caption=caption, stamp=str(now._replace(digest=known.digest)))
    else:
        found.changed[item.path] = caption


def _digest(path: str) -> str:
    try:
        return FileStamp.digest_of(read_file(Path(path)))
    except OSError:
        return ""


def _embed(
    index: ImageIndex,
    todo: list[str],
    where: Path,
    load: Callable[[], Fromage],
    captions: str | Path | None,
    beside: Path,
    batch_size: int,
    workers: int,
) -> EmbeddingStore:
    """Embed some files of a folder."""
    model = load()
    index.require_model(model)
    source = find_images(str(where), model.vision.transform, Path(captions) if captions else None, batch_size)
    parts = source.parts_of(todo)
    return embed_source(model, source.only(parts, range(len(parts)), len(todo)), beside, workers=workers)


def _bad(broken: list[str], paths: set[str]) -> dict[str, str]:
    """What lines 'path: cause' say of which paths."""
    pieces = (line.split(": ") for line in broken)
    return {
        path: ": ".join(piece[n:])
        for piece in pieces
        for n in range(1, len(piece))
        if (path := ": ".join(piece[:n])) in paths
    }


def _key(path: str, root: ImageRoot) -> str:
    """The name of a file that is left out, in index.json."""
    return root.store(os.fsencode(path)).decode("utf-8", "backslashreplace")


def _stamp(path: str) -> str:
    """Size and time of change of a file as it is now; '' where it is gone."""
    now = FileStamp.at(path)
    return f"{now.size} {now.changed}" if now else ""


def _known(index: ImageIndex, paths: list[str]) -> dict[str, tuple[str, str]]:
    """The files that an earlier sync found to be no images, and which are as they were then: their stamps and why."""
    known = {}
    for path in paths if index.place.left_out else ():
        size, _, rest = index.place.left_out.get(_key(path, index.root), "").partition(" ")
        changed, _, cause = rest.partition(" ")
        if cause and _stamp(path) == f"{size} {changed}":
            known[path] = f"{size} {changed}", cause
    return known


def _remembered(bad: dict[str, str], was: dict[str, str], root: ImageRoot) -> dict[str, str]:
    """What is kept of files that cannot be decoded; one that cannot be read may be tomorrow, without any change to it."""
    return {_key(path, root): f"{was[path]} {cause}" for path, cause in bad.items() if cause.startswith(UNDECODABLE)}


def _captioned(rows: Iterator[Embedded], captions: dict[str, str]) -> Iterator[Embedded]:
    """Rows with these captions, by path, in place of their own."""
    for vectors, batch in rows:
        yield (
            vectors,
            to_batch([item._replace(caption=captions.get(item.path, item.caption)) for item in ItemTable([batch])]),
        )


def _touched(index: ImageIndex, touched: dict[str, Item]) -> Iterator[Embedded]:
    """The rows of images whose content is the same, with their items as they are now."""
    for vectors, batch in index.rows() if touched else ():
        items = list(ItemTable([batch]))
        at = [i for i, item in enumerate(items) if item.path in touched]
        if at:
            yield np.asarray(vectors)[at], to_batch([touched[items[i].path] for i in at])


def _stale(folder: Path, index: ImageIndex, root: ImageRoot) -> bool:
    """Whether index.json says of the images' place what it should not."""
    about = read_about(folder)
    own = index.place.own and secret() is not None
    meant = (root if index.moves_root else index.root).path, own, index.place.confined
    return (about.get("root"), is_sealed(about), bool(about.get("confined"))) != meant
