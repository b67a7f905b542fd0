"""A saved index on disk: what its folder holds, how it gets there whole, and how damage is noticed.

    vectors.f32    (N, q) unit rows, float32, without a header
    items.arrow    path and caption of each row
    index.faiss    what proposes candidates, for kinds that are not flat
    texts.f32      (n, q) unit rows of captions as searched for, with which these are measured; where there were some
    index.json     format, count, width, fingerprint, kind, and the files' sizes and digests; written last

All but index.json are mapped into memory when the index is opened, so that millions of rows open at once. Of an index in
Milvus there is index.json alone, which names the server and the collection.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fromage.errors import UserError, first_line

FORMAT, VERSION = "fromage-index", 2
VECTORS, ITEMS, CANDIDATES, TEXTS, ABOUT = "vectors.f32", "items.arrow", "index.faiss", "texts.f32", "index.json"
KEYS = {"count", "width", "fingerprint", "checkpoint", "kind", "setting", "recall_at_10", "files"}
MILVUS = "milvus"  # the key of what only an index in Milvus says: uri and collection
BLOCK, BLOCKS = 1 << 16, 64  # bytes; a spot digest reads so many blocks, spread over the file


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Write index.json over the finished files of a folder."""
    files = {path.name: _file(path) for path in sorted(folder.iterdir())}
    about = {"format": FORMAT, "version": VERSION, **about, "files": files}
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _file(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "spot": _spot_digest(path), "sha256": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _spot_digest(path: Path) -> str:
    """Of 64 blocks and the end: all of a file up to 4 MB; of a larger one what tells a torn copy from a whole one."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for start in [*range(0, size, max(BLOCK, size // BLOCKS)), max(0, size - BLOCK)]:
            file.seek(start)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def read_about(folder: Path) -> dict[str, Any]:
    """What index.json says. Raises UserError where there is no index, or one of another version."""
    if not folder.exists() and _aside(folder).exists():
        raise UserError(f"{folder}: saving was interrupted; the former index is whole: rename {_aside(folder)} to {folder}")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        known = (about["format"], about["version"]) == (FORMAT, VERSION) and about.keys() >= KEYS
        if not known or not _complete(about):
            raise ValueError("of another format or version")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: is no readable index ({error}); build one with: fromage index build") from error
    return about


def _complete(about: dict[str, Any]) -> bool:
    """Whether what is said of files, or of Milvus, is what an index needs."""
    files = about["files"].keys()
    if MILVUS in about:
        return not files and {"uri", "collection"} <= about[MILVUS].keys()
    return {VECTORS, ITEMS} <= files <= {VECTORS, ITEMS, CANDIDATES, TEXTS}


def check_files(folder: Path, about: dict[str, Any], full: bool = False) -> None:
    """Raise UserError for a file that is missing or damaged.

    Sizes and spot digests are compared, which takes milliseconds whatever the size, and finds any damage in files of up
    to 4 MB, and torn ones of any size; full: the digests of all bytes.
    """
    for name, said in about["files"].items():
        path = folder / name
        whole = path.is_file() and path.stat().st_size == said["bytes"] and _spot_digest(path) == said["spot"]
        if not whole or (full and _digest(path) != said["sha256"]):
            raise UserError(f"{path}: is missing or damaged (its digest differs); build the index again")


def check_replaceable(folder: str | Path) -> None:
    """Raise UserError unless an index may be saved here: nothing is here yet, or an index and no other file."""
    folder = Path(folder).resolve()
    if not folder.exists():
        return
    files = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if files != {ABOUT} and not {VECTORS, ITEMS, ABOUT} <= files <= {VECTORS, ITEMS, CANDIDATES, TEXTS, ABOUT}:
        raise UserError(f"{folder}: exists and is not an index (or not only); choose another place or remove it")
    read_about(folder)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """A new folder to fill, which takes the name, and the place of an index that is there, once it is whole.

    Raises UserError where anything but an index is in the way, and when the disk is full.
    """
    folder = Path(folder).resolve()
    check_replaceable(folder)
    new, old = folder.with_name(f".{folder.name}.{os.getpid()}.new"), _aside(folder)
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        _swap(new, folder, old)
    except (OSError, RuntimeError) as error:  # FAISS raises the latter
        still = "what was there before still is" if folder.exists() else "make room, or choose another place"
        raise UserError(f"{folder}: the index cannot be written ({first_line(error)}); {still}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _swap(new: Path, folder: Path, old: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed here
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
