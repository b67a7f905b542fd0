"""A saved index on disk: what its folder holds, how it gets there whole, and how damage is noticed.

    vectors.f32    (N, q) unit rows, float32, without a header; of kinds that are not flat vectors.f16, float16
    items.arrow    path, caption, metadata and stamp of each row
    metadata.arrow columns of a table, a row for each row; where there was one
    index.faiss    what proposes candidates, for kinds that are not flat
    texts.f32      (n, q) unit rows of captions as searched for, with which these are measured; where there were some
    index.json     format, backend, count, width, fingerprint, kind, root of the images, and the files' sizes and digests;
                   written last, and sealed (fromage.retrieval.trust)

All but index.json are mapped into memory when the index is opened, so that millions of rows open at once. Of an index in
Milvus there is index.json alone, which names the server and the collection.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from fromage.errors import UserError, reason
from fromage.identity import FolderKind
from fromage.io import check_new, digest_of, set_aside, whole_folder, write_json
from fromage.retrieval import trust
from fromage.retrieval.image_root import ImageRoot, common_root
from fromage.retrieval.item_table import Embedded, ItemTable, with_paths, write_items

FORMAT, VERSION = "fromage-index", 3
VECTORS, ROUNDED, ITEMS, METADATA = "vectors.f32", "vectors.f16", "items.arrow", "metadata.arrow"
CANDIDATES, TEXTS, ABOUT = "index.faiss", "texts.f32", "index.json"
INDEX = FolderKind(
    ABOUT,
    "an index",
    again="build one with: fromage index build",
    format=(FORMAT, VERSION),
    reads=frozenset({2}),  # absolute paths, no metadata, no stamps, no seal
    keys=frozenset({"count", "width", "fingerprint", "checkpoint", "kind", "setting", "recall_at_10", "files"}),
)
KINDS = {"count": int, "width": int, "fingerprint": str, "checkpoint": str, "kind": str, "setting": str}  # of what it says
LONGEST = 4096  # characters of a path
MILVUS = "milvus"  # the key of what only an index in Milvus says: uri and collection
BLOCK, BLOCKS = 1 << 16, 64  # bytes; a spot digest reads so many blocks, spread over the file


def write_rows(folder: Path, rows: Iterable[Embedded], root: ImageRoot | None = None) -> ImageRoot:
    """Write unit vectors and items, some at a time, into a new folder; returns what the paths are then relative to.

    root: None for the deepest folder that holds all files.
    """

    def items(file: IO[bytes]) -> Iterator[pa.RecordBatch]:
        for vectors, batch in rows:
            file.write(vectors.astype("<f4", copy=False).tobytes())
            yield with_paths(batch, root.stored) if root else batch

    with (folder / VECTORS).open("wb") as file:
        write_items(folder / ITEMS, items(file))
    if root:
        return root
    whole = ItemTable.open(folder / ITEMS)
    root = ImageRoot(common_root(whole.paths().chunks))
    if root.path:
        write_items(folder / f"{ITEMS}.part", (with_paths(batch, root.stored) for batch in whole.batches))
        (folder / f"{ITEMS}.part").replace(folder / ITEMS)
    return root


def open_rows(folder: Path, width: int, root: ImageRoot | None = None) -> tuple[np.ndarray, ItemTable]:
    """Map what write_rows wrote into memory: (N, width) vectors, and the items. Raises UserError if the two do not fit."""
    rounded = (folder / ROUNDED).exists()
    path = folder / (ROUNDED if rounded else VECTORS)
    if not (size := path.stat().st_size):
        raise UserError("an index needs at least one image; none is left")
    items = ItemTable.open(folder / ITEMS, root)
    if size != (2 if rounded else 4) * len(items) * width:
        raise UserError(f"{folder}: {len(items)} images and {size} bytes of vectors do not fit; build the index again")
    return np.memmap(path, "<f2" if rounded else "<f4", "r").reshape(len(items), width), items


def halve(folder: Path) -> None:
    """Rewrite the vectors of a new folder in float16, which is enough to rank candidates with."""
    with (folder / VECTORS).open("rb") as old, (folder / ROUNDED).open("wb") as new:
        while data := old.read(BLOCK << 4):
            new.write(np.frombuffer(data, "<f4").astype("<f2").tobytes())
    (folder / VECTORS).unlink()


def write_about(folder: Path, about: dict[str, Any], own: bool = True) -> None:
    """Write index.json over the finished files of a folder. own: as for sealed."""
    files = {path.name: _file(path) for path in sorted(folder.iterdir()) if path.name != ABOUT}
    write_json(folder / ABOUT, about_json(about, files, own))


def about_json(about: dict[str, Any], files: dict[str, Any], own: bool = True) -> dict[str, Any]:
    """All of index.json. files: by name, their size and digests. own: whether it was built here, which it then proves."""
    whole = {"format": FORMAT, "version": VERSION, **about, "files": files}
    return trust.sealed(whole) if own else whole


def _file(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "spot": _spot_digest(path), "sha256": digest_of(path)}


def _spot_digest(path: Path) -> str:
    """Of 64 blocks and the end: all of a file up to 4 MB; of a larger one what tells a torn copy from a whole one."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for start in [*range(0, size, max(BLOCK, size // BLOCKS)), max(0, size - BLOCK)]:
            file.seek(start)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def read_about(folder: Path) -> dict[str, Any]:
    """What index.json says. Raises UserError where there is no index, one of another version, or one that makes no sense."""
    _check_not_interrupted(folder)
    about = INDEX.read(folder)
    for name, kind in KINDS.items():
        if not isinstance(about[name], kind) or (name == "width" and about[name] < 1):
            raise INDEX.unreadable(folder, f"{name} is {about[name]!r:.40}")
    if not isinstance(about["files"], dict) or not all(_is_file(name, said) for name, said in about["files"].items()):
        raise INDEX.unreadable(folder, "it names no files")
    check_paths(INDEX, folder, about)
    for name in ("left_out", "columns"):
        said = about.get(name, {})
        if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
            raise INDEX.unreadable(folder, f"{name} is no object of texts")
    return about


def _check_not_interrupted(folder: Path) -> None:
    """Raise UserError where an index was set aside and the one that replaces it did not get its name."""
    folder = folder.resolve()  # what was set aside lies beside the index, not beside a link to it
    if not folder.exists() and (aside := set_aside(folder)).exists():
        raise UserError(f"{folder}: saving was interrupted; the former index is whole: rename {aside} to {folder}")


def check_paths(kind: FolderKind, folder: Path, about: dict[str, Any]) -> None:
    """Raise UserError where the paths and the fingerprint that a folder names cannot be such."""
    root, checkpoint, fingerprint = (about.get(name) or "" for name in ("root", "checkpoint", "fingerprint"))
    if not _is_path(root) or (root and not Path(root).is_absolute()):
        raise kind.unreadable(folder, f"root is {root!r:.40}, no absolute folder")
    if not _is_path(checkpoint):
        raise kind.unreadable(folder, f"checkpoint is {checkpoint!r:.40}, no path")
    if not isinstance(fingerprint, str) or "/" in fingerprint or "\0" in fingerprint:
        raise kind.unreadable(folder, f"fingerprint is {fingerprint!r:.40}")


def _is_path(value: Any) -> bool:
    """Whether a disk takes it; names that are not UTF-8 have their bytes as surrogates."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value) and len(value) <= LONGEST
    except UnicodeEncodeError:
        return False


def _is_file(name: str, said: Any) -> bool:
    """Whether index.json names a file of its folder, with size and digests."""
    named = Path(name).name == name and len(name) < 256
    return named and isinstance(said, dict) and said.keys() >= {"bytes", "spot", "sha256"}


def check_files(folder: Path, about: dict[str, Any], full: bool | Container[str] = False) -> None:
    """Raise UserError for a file that is missing or damaged.

    Sizes and spot digests are compared, which takes milliseconds whatever the size, and finds any damage in files of up
    to 4 MB, and torn ones of any size. full: compare the digests of all bytes, of all files or of those named.
    """
    read = about["files"] if full is True else full or ()
    for name, said in about["files"].items():
        path = folder / name
        whole = path.is_file() and path.stat().st_size == said["bytes"] and _spot_digest(path) == said["spot"]
        if not whole or (name in read and digest_of(path) != said["sha256"]):
            raise UserError(f"{path}: is missing or damaged (its digest differs); build the index again")


def check_replaceable(folder: str | Path, overwrite: bool) -> None:
    """Raise UserError unless an index may be saved here: nothing is there, or an index alone, which may be replaced."""
    folder = Path(folder).resolve()
    if not overwrite:
        _check_not_interrupted(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    INDEX.require_own(folder)
    if {path.name for path in folder.iterdir()} - {ABOUT} - read_about(folder)["files"].keys():
        raise INDEX.something_else(folder)
    check_new(folder, overwrite)


@contextmanager
def replacing(folder: str | Path, overwrite: bool) -> Iterator[Path]:
    """A new folder to fill, which takes the name, and the place of an index that is there, once it is whole.

    Raises UserError where an index that may not be replaced, or anything else, is in the way, where another process is
    writing it, and when the disk is full.
    """
    folder = Path(folder).resolve()
    check_replaceable(folder, overwrite)
    try:
        with whole_folder(folder) as new:
            yield new
    except (OSError, RuntimeError) as error:  # FAISS raises the latter
        still = "what was there before still is" if folder.exists() else "make room, or choose another place"
        raise UserError(f"{folder}: the index cannot be written ({reason(error)}); {still}") from error
