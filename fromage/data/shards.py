"""Reading shards of webdataset.

A shard is a tar of about a thousand samples. A sample is three members that share a key: KEY.jpg, KEY.txt (the caption, or
the first of several) and KEY.json (whatever else is known of it; "captions" lists all captions where there are several).
"""

from __future__ import annotations

import re
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import islice
from subprocess import TimeoutExpired
from typing import Any

from PIL import Image

from fromage.data.shard_names import shard_name
from fromage.data.shard_streams import is_remote, open_shard
from fromage.errors import BrokenSample, reason
from fromage.images.codec import SUFFIXES, decode_image
from fromage.images.tars import MAX_MEMBER, plain_files
from fromage.io import json_object

Raw = dict[str, Any]  # a stored sample: '__key__', and the members' bytes by extension
ATTEMPTS = 3  # to read a shard that comes over the network
UNREAD = "unreadable"  # begins a cause that may be gone at another attempt, with no change to the shard or file
KEYED = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # webdataset's key: all before the first dot of the file's name
BREAKS = (OSError, TimeoutExpired, tarfile.TarError, EOFError, zlib.error)  # what ends the reading of a shard
MAX_CAPTION = 65536  # bytes; what is longer is a page that was taken for a caption


def read_shard(shard: str, lost: Callable[[str, str], None]) -> Iterator[Raw]:
    """Yield a shard's samples, the extensions in lower case.

    A shard that cannot be read to its end is reported to lost(shard's name, cause), after further attempts where it comes
    over the network; so is an empty one, and a member that cannot belong to a sample. The half sample at a break is not
    yielded. The cause begins with UNREAD unless it lies in a file's content.
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
            stream.close()
            if not done:
                lost(shard_name(shard), "empty: holds no sample")
            return
        except BREAKS as error:
            lasting = isinstance(error, tarfile.TarError | EOFError | zlib.error) and not is_remote(shard)
            kind = "truncated or damaged" if lasting else UNREAD
            cause = f"{kind}: after {done} samples, {reason(error)}"
        finally:
            if stream is not None:
                with suppress(OSError):
                    stream.close()
    lost(shard_name(shard), cause)


def first_sample(shard: str) -> Raw:
    """The first sample of a shard, read without further attempts; empty where none comes."""
    with suppress(*BREAKS), closing(open_shard(shard)) as stream:
        return next(_samples(stream, shard, lambda name, why: None), {})
    return {}


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
    listed = json_object(data).get("captions")
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
