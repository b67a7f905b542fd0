"""Writing shards. A shard has its name only when it is whole; sizes.json beside it then says how many samples it holds."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import webdataset as wds

from fromage.data.shard_sizes import read_sizes
from fromage.errors import UserError
from fromage.io import WholeFile, write_json, writing
from fromage.locks import held

OWNER = "fromage"  # of the members of a tar
BESIDE = ("sizes.json", "report.json", "features.json", "broken.json")  # what is said of the shards of a folder


class ShardWriter:
    """A tar that gets its name, and its line in sizes.json, when close() finds it whole. Equal samples, equal bytes."""

    def __init__(self, path: Path, kept: str) -> None:
        """kept: for the message of a full disk, what is there then and how to go on."""
        self.path, self.kept, self.whole = path, kept, WholeFile(path)
        self.keys: set[str] = set()
        with writing(path, kept):
            self.file = self.whole.part.open("wb")
        self.tar = wds.TarWriter(self.file, encoder=False, mtime=0, user=OWNER, group=OWNER)

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Add a sample: members by extension, as in {'jpg': ..., 'txt': ...}."""
        if not key or "." in key.rpartition("/")[2] or key in self.keys:
            raise UserError(f"sample key {key!r} is empty, holds a dot or is used twice: give every sample its own key")
        self.keys.add(key)
        with writing(self.path, self.kept):
            self.tar.write({"__key__": key, **members})

    def close(self) -> None:
        """Finish the tar, give it its name and record its size."""
        with writing(self.path, self.kept):
            self.tar.close()
            self.file.close()
            self.whole.keep()
        sizes = read_sizes(self.path.parent) | {self.path.name: len(self.keys)}
        write_json(self.path.parent / "sizes.json", dict(sorted(sizes.items())))

    def discard(self) -> None:
        """Drop a tar that was not closed; harmless after close()."""
        for file in (self.tar, self.file):
            with suppress(OSError):  # what is still in memory does not get onto a full disk
                file.close()
        self.whole.discard()


def check_no_shards(folder: Path) -> None:
    """Raise UserError where a folder holds shards already."""
    if any(folder.glob("*.tar")):
        raise UserError(f"{folder} holds shards already: name another folder, or replace them with --overwrite")


def own_shards(folder: Path) -> list[Path]:
    """The shards of a folder that were written here. Raises UserError for tars of others, which nobody may replace."""
    try:
        ours = set(read_sizes(folder))
    except UserError:  # damaged
        ours = set()
    shards = sorted(folder.glob("*.tar"))
    if strange := [path.name for path in shards if path.name not in ours and not _is_own(path)]:
        raise UserError(f"{folder} holds {strange[0]}, which is no shard of this command; name another folder")
    return shards


def _is_own(shard: Path) -> bool:
    """Whether the first member of a tar says that it was written here."""
    try:
        with tarfile.open(shard, "r:") as tar:
            first = tar.next()
    except (OSError, tarfile.TarError):
        return False
    return first is not None and first.uname == OWNER


def remove_shards(folder: Path) -> None:
    """Remove the shards of a folder, and what is said of them. Raises UserError as own_shards does."""
    for old in (*own_shards(folder), *(folder / name for name in BESIDE)):
        old.unlink(missing_ok=True)


def write_shards(
    samples: Iterable[tuple[str, bytes, str, dict[str, Any]]], out: Path, per_shard: int = 1000, overwrite: bool = False
) -> int:
    """Write (key, JPEG bytes, caption, meta) as write_members does."""
    members = ((key, members_of(jpeg, caption, meta)) for key, jpeg, caption, meta in samples)
    return write_members(members, out, per_shard, overwrite)


def members_of(jpeg: bytes, caption: str, meta: dict[str, Any]) -> dict[str, bytes]:
    """The members of a sample, by extension."""
    return {"jpg": jpeg, "txt": caption.encode(), "json": json.dumps(meta, ensure_ascii=False).encode()}


def write_members(
    samples: Iterable[tuple[str, dict[str, bytes]]], out: Path, per_shard: int = 1000, overwrite: bool = False
) -> int:
    """Write (key, members) as 00000.tar, 00001.tar ... of a new folder; returns how many there were.

    overwrite: shards that are there are removed when there is a first sample to write. Raises UserError where the folder
    holds shards already, or with overwrite tars of others, another process writes it, the disk is full, or a key cannot be
    one.
    """
    own_shards(out) if overwrite else check_no_shards(out)  # before the lock, which makes the folder
    with held(out):
        return _write_members(samples, out, per_shard, overwrite)


def _write_members(samples: Iterable[tuple[str, dict[str, bytes]]], out: Path, per_shard: int, overwrite: bool) -> int:
    total = 0
    for number, group in groupby(enumerate(samples), key=lambda item: item[0] // per_shard):
        if number == 0 and overwrite:
            remove_shards(out)
        kept = f"whole shards before it: {number}; to begin again, give --overwrite"
        shard = ShardWriter(out / f"{number:05d}.tar", kept)
        try:
            for _, (key, members) in group:
                shard.write(key, members)
            shard.close()
        finally:
            shard.discard()
        total += len(shard.keys)
    return total
