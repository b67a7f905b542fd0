"""Names of shards: what a pattern stands for, and what a shard is called."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from braceexpand import braceexpand

from fromage.data.shard_streams import check_protocol, is_remote
from fromage.errors import UserError


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
