"""How many samples shards hold: the file sizes.json beside them says so."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from fromage.data.annotations import below, problem
from fromage.data.shard_streams import is_remote, read_remote_json
from fromage.errors import UserError, reason
from fromage.io import read_json

log = logging.getLogger(__name__)
COUNT = below(1 << 40)  # samples of a shard


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


def total(sized: Iterable[tuple[str, int | None]]) -> int | None:
    """How many samples (shard, size) pairs hold together; None where a size is not known."""
    sizes = [size for _, size in sized]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None
