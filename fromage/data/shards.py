"""Webdataset shards: naming them, writing and reading them.

A shard is a tar of about a thousand samples. A sample is three members that share a key: KEY.jpg, KEY.txt (the caption, or
the first of several) and KEY.json (whatever else is known of it; "captions" lists all captions where there are several).
The file sizes.json beside the shards says how many samples each one holds.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import tarfile
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import groupby, islice
from math import ceil
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any, TypeVar

import webdataset as wds
from braceexpand import braceexpand
from PIL import Image

from fromage.data.annotations import below, problem
from fromage.data.shard_streams import check_protocol, is_remote, open_shard, read_remote_json
from fromage.errors import BrokenSample, UserError, reason
from fromage.images.codec import SUFFIXES, decode_image
from fromage.images.tars import MAX_MEMBER, plain_files
from fromage.io import WholeFile, read_json, write_json, writing
from fromage.locks import held

log = logging.getLogger(__name__)
Raw = dict[str, Any]  # a stored sample: '__key__', and the members' bytes by extension
T = TypeVar("T")
CHECK_FROM = 100  # samples; a smaller stream is judged at its end
ATTEMPTS = 3  # to read a shard that comes over the network
KEYED = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # webdataset's key: all before the first dot of the file's name
COUNT = below(1 << 40)  # samples of a shard
MAX_CAPTION = 65536  # bytes; what is longer is a page that was taken for a caption


# --- naming ---------------------------------------------------------------------------------------------------------


def expand(urls: str | list[str]) -> list[str]:
    """Name every shard that patterns stand for, in order.

    A pattern is a path or URL with or without braces (00{000..331}.tar), a glob, or a folder (all its *.tar). fsspec reads
    the URLs: http, https and hf as installed, s3 with s3fs, gs with gcsfs. 'pipe:COMMAND' is what a command writes.

    Raises:
        UserError: a shard is missing, a pattern means no shard, or nothing installed reads such URLs.
    """
    patterns = [urls] if isinstance(urls, str) else list(urls)
    if not patterns:
        raise UserError("no shards are named: give a folder, or a pattern such as shards/{00000..00331}.tar")
    return [shard for pattern in patterns for name in _braces(pattern) for shard in _shards(name)]


def _braces(pattern: str) -> list[str]:
    if "{" not in pattern or os.path.exists(pattern):  # noqa: PTH110 (Path.exists raises for a long pattern)
        return [pattern]
    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise UserError(f"the braces of {pattern!r} do not match: write for example {{00000..00331}}.tar") from None


def _shards(name: str) -> list[str]:
    """The shards of one name without braces."""
    if name.startswith("pipe:"):
        return [name]
    if is_remote(name):
        check_protocol(name)
        return [name]
    path = Path(name).expanduser()
    if path.is_file():
        return [str(path)]
    found = sorted(path.glob("*.tar")) if path.is_dir() else sorted(map(Path, glob.glob(str(path))))  # noqa: PTH207
    if found:
        return [str(p) for p in found]
    if path.is_dir() or any(sign in name for sign in "*?["):
        raise UserError(f"{name} holds no .tar shard: correct the path, or pack your data into shards first")
    raise UserError(f"shard {name} is missing: correct the path or the range of the pattern, or fetch the shard")


def shard_name(shard: str) -> str:
    """The file name of a shard, which may be a path, a URL or a command: '00000.tar'."""
    return re.findall(r"[^/\\\s'\"=]+\.tar", shard)[-1] if ".tar" in shard else Path(shard).name


# --- writing --------------------------------------------------------------------------------------------------------


class ShardWriter:
    """A tar that gets its name, and its line in sizes.json, when close() finds it whole. Equal samples, equal bytes."""

    def __init__(self, path: Path, kept: str) -> None:
        """kept: for the message of a full disk, what is there then and how to go on."""
        self.path, self.kept, self.whole = path, kept, WholeFile(path)
        self.keys: set[str] = set()
        with writing(path, kept):
            self.file = self.whole.part.open("wb")
        self.tar = wds.TarWriter(self.file, encoder=False, mtime=0, user="fromage", group="fromage")

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


def read_sizes(folder: Path) -> dict[str, int]:
    """The samples of each shard of a folder, by file name, as sizes.json has them; empty where there is none."""
    path = folder / "sizes.json"
    return _sizes(read_json(path, "a folder whose sizes.json is whole, or remove it"), path) if path.exists() else {}


def _sizes(found: Any, name: object) -> dict[str, int]:
    if not isinstance(found, dict) or any(problem(count, COUNT) for count in found.values()):
        raise UserError(f"{name} is not a JSON object of shard names and counts: correct or remove it")
    return found


def _remote_sizes(folder: str) -> dict[str, int]:
    """read_sizes of a URL. What cannot be read is logged: the epoch then has no known length."""
    try:
        return _sizes(read_remote_json(f"{folder}/sizes.json") or {}, "it")
    except (OSError, ValueError, RecursionError, UserError) as error:
        log.warning("no sizes of the shards in %s: sizes.json cannot be read (%s)", folder, reason(error))
        return {}


def shard_sizes(shards: list[str]) -> list[int | None]:
    """How many samples each shard holds, None where no sizes.json beside it says so."""
    local, remote = cache(read_sizes), cache(_remote_sizes)

    def size(shard: str) -> int | None:
        if not is_remote(shard):
            return local(Path(shard).parent).get(Path(shard).name)
        folder, _, name = shard.rpartition("/")
        return None if shard.startswith("pipe:") or "?" in shard else remote(folder).get(name)

    return [size(shard) for shard in shards]


def sized(shards: list[str]) -> list[tuple[str, int | None]]:
    """Shards, each with how many samples it holds."""
    return list(zip(shards, shard_sizes(shards), strict=True))


def check_no_shards(folder: Path) -> None:
    """Raise UserError where a folder holds shards already."""
    if any(folder.glob("*.tar")):
        raise UserError(f"{folder} holds shards already: name another folder, or replace them with --overwrite")


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
    holds shards already, another process writes it, the disk is full, or a key cannot be one.
    """
    if not overwrite:
        check_no_shards(out)  # before the lock, which makes the folder
    with held(out):
        return _write_members(samples, out, per_shard, overwrite)


def _write_members(samples: Iterable[tuple[str, dict[str, bytes]]], out: Path, per_shard: int, overwrite: bool) -> int:
    total = 0
    for number, group in groupby(enumerate(samples), key=lambda item: item[0] // per_shard):
        if number == 0 and overwrite:
            for old in (*out.glob("*.tar"), *(out / name for name in BESIDE)):
                old.unlink(missing_ok=True)
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


# --- reading --------------------------------------------------------------------------------------------------------


BESIDE = ("sizes.json", "report.json", "features.json")  # what is said of the shards of a folder


def read_shard(shard: str, lost: Callable[[str, str], None]) -> Iterator[Raw]:
    """Yield a shard's samples, the extensions in lower case.

    A shard that cannot be read to its end is reported to lost(shard's name, cause), after further attempts where it comes
    over the network; so is an empty one, and a member that cannot belong to a sample. The half sample at a break is not
    yielded.
    """
    done, cause = 0, ""
    told: set[tuple[str, str]] = set()

    def lost_once(name: str, why: str) -> None:  # however often the shard is begun again
        if (name, why) not in told:
            told.add((name, why))
            lost(name, why)

    for attempt in range(ATTEMPTS if is_remote(shard) else 1):
        time.sleep(2 * attempt)
        stream = None
        try:
            stream = open_shard(shard)
            for sample in islice(_samples(stream, shard, lost_once), done, None):
                done += 1
                yield sample
            while stream.read(1 << 20):  # a command that is not read to its end would fail
                pass
            stream.close()
            if not done:
                lost(shard_name(shard), "empty: holds no sample")
            return
        except (OSError, TimeoutExpired, tarfile.TarError, EOFError, zlib.error) as error:
            cause = f"unreadable or truncated: after {done} samples, {reason(error)}"
        finally:
            if stream is not None:
                with suppress(OSError):
                    stream.close()
    lost(shard_name(shard), cause)


def _samples(stream: Any, shard: str, lost: Callable[[str, str], None]) -> Iterator[Raw]:
    """The samples of a tar as webdataset groups them: members that share a key and stand together."""

    def unusable(name: str, why: str) -> None:
        lost(shard_name(shard), f"unusable member: {name} {why}")

    sample: Raw = {}
    size = 0  # bytes
    for name, read in plain_files(stream, unusable):
        if not (parts := KEYED.match(name)):
            continue
        key, suffix = parts[1], parts[2].lower()
        if key != sample.get("__key__"):
            if len(sample) > 1:
                yield sample
            sample, size = {"__key__": key}, 0
        if suffix in sample:
            unusable(name, "is there twice")
        elif (size := size + len(data := read())) > MAX_MEMBER:
            unusable(name, f"makes a sample of more than {MAX_MEMBER:,} bytes")
        else:
            sample[suffix] = data
    if len(sample) > 1:
        yield sample


def captions_of(raw: Raw) -> list[str]:
    """All captions, at least one, without surrounding space: the list "captions" of KEY.json, else what KEY.txt holds.

    Raises BrokenSample where they are missing, empty, enormous, not UTF-8 or not text.
    """
    listed = _listed_captions(raw.get("json", b""))
    if listed is None and "txt" not in raw:
        raise BrokenSample("no caption: member txt is missing")
    texts = [text for one in ([raw["txt"]] if listed is None else listed) if (text := plain_text(one))]
    if not texts:
        raise BrokenSample("empty caption")
    return texts


def _listed_captions(data: bytes) -> list[Any] | None:
    """The list "captions" of a sample's JSON; None where there is none."""
    if b'"captions"' not in data:  # others' JSON can be large
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    listed = found.get("captions") if isinstance(found, dict) else None
    return listed if isinstance(listed, list) else None


def plain_text(said: Any) -> str:
    """One caption from its bytes, or from the text of a JSON, without surrounding space. Raises BrokenSample."""
    if not isinstance(said, bytes | str):
        raise BrokenSample(f"caption is not text: {type(said).__name__} among the captions of member json")
    try:
        data = said.encode() if isinstance(said, str) else said  # half a character of a JSON cannot be encoded
        if len(data) > MAX_CAPTION:
            raise BrokenSample(f"caption too long: {len(data)} bytes")
        return data.decode("utf-8").strip()
    except UnicodeError:
        raise BrokenSample("caption is not UTF-8") from None


def image_of(raw: Raw) -> Image.Image:
    """The image in RGB. Raises BrokenSample where it is missing or cannot be decoded."""
    return decode_image(image_file(raw))


def image_file(raw: Raw) -> bytes:
    """The image as it is stored. Raises BrokenSample where there is none."""
    data = next((raw[kind] for kind in SUFFIXES if kind in raw), None)
    if data is None:
        raise BrokenSample("no image: member jpg is missing")
    return data


# --- reading in workers ----------------------------------------------------------------------------------------------


class Broken:
    """Counts the samples a worker used and those it could not, logs the latter, and stops when they are too many."""

    def __init__(self, limit: float, option: str = "max_broken") -> None:
        """limit: share of the samples, 0 to 1, that may be broken; option: what sets it."""
        self.option = option
        self.limit, self.good, self.bad, self.lost, self.missing = limit, 0, 0, 0, 0
        self.read = 0  # samples of all shards, where others use some of them
        self.last: deque[str] = deque(maxlen=5)

    def add(self, key: str, cause: str) -> None:
        """Count and log a sample that cannot be used."""
        self.bad += 1
        self._note(key, cause)

    def lose(self, shard: str, cause: str) -> None:
        """Count and log a shard that cannot be read to its end, or a member of it that belongs to no sample."""
        self.lost += 1
        self._note(shard, cause)

    def _note(self, name: str, cause: str) -> None:
        cause = " ".join(cause.split())
        log.warning("skipped %s: %s", name, cause)
        self.last.append(f"{name} ({cause})")
        self.check()

    def check(self, end: bool = False) -> None:
        """Raise UserError where more than the limit is broken; a stream of under a hundred is judged at its end.

        Samples that a shard holds too few count at the end alone: shards are read ahead of their samples' use.
        """
        lost: float = self.lost + (self.missing if end else 0)
        if self.read:  # this worker's share of what all of them lose
            lost = lost * (self.good + self.bad) / self.read
        bad = self.bad + lost
        seen = bad + self.good
        if (end or seen >= CHECK_FROM) and bad > self.limit * seen:
            share = (
                f"{ceil(bad)} of {ceil(seen)} samples are broken ({bad / seen:.1%}, {self.option} allows {self.limit:.1%})"
            )
            raise UserError(f"{share}; the last: {', '.join(self.last)}; mend or remove them, or raise {self.option}")


def read_shards(shards: Iterable[tuple[str, int | None]], broken: Broken) -> Iterator[Raw]:
    """The stored samples of (shard, size) pairs, in order; what a shard holds too few, by sizes.json, counts as broken."""
    for shard, size in shards:
        found = 0
        for raw in read_shard(shard, broken.lose):
            found += 1
            yield raw
        if size is not None and found < size:
            broken.missing += size - found
            broken.last.append(f"{shard_name(shard)} ({found} samples of {size})")
            log.warning("%s holds %d samples, sizes.json says %d", shard, found, size)


def decoded(raws: Iterable[Raw], decode: Callable[[Raw], T], broken: Broken) -> Iterator[T]:
    """Decode stored samples, leaving out the broken ones."""
    for raw in raws:
        try:
            sample = decode(raw)
        except BrokenSample as error:
            broken.add(raw["__key__"], str(error))
            continue
        broken.good += 1
        broken.check()
        yield sample
