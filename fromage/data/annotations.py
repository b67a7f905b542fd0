"""Entries of annotation files, checked by a schema: those that are odd are told of and left out, and too many refuse a file.

A value of `Schema` says what an entry holds: {"image_id": ID, "caption": TEXT} is a mapping that holds both, [NUMBER] a list
of numbers, (NUMBER,) * 4 a list of four. Each published format is checked once, where it is read, by `fitting`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from fromage.checks import HALVES
from fromage.errors import UserError

LARGE = 2**63  # of whole numbers, as in databases
MAX_ODD = 0.05  # share of a file's entries that may be odd, where nothing else is said by odd_allowed


@dataclass
class OddAllowed:
    """share: of a file's entries that may be odd, 0 to 1. count: of those that were left out so far."""

    share: float
    count: int = 0


_allowed: ContextVar[OddAllowed | None] = ContextVar("odd entries", default=None)


@contextmanager
def odd_allowed(share: float) -> Iterator[OddAllowed]:
    """In this context a share (0 to 1) of a file's entries may be odd: --max-lost, which the user gave."""
    allowed = OddAllowed(share)
    before = _allowed.set(allowed)
    try:
        yield allowed
    finally:
        _allowed.reset(before)


class FieldType(NamedTuple):
    """What a field may be: its name for messages, and a test."""

    name: str
    fits: Callable[[Any], bool]


Schema: TypeAlias = "FieldType | Mapping[str, Schema] | Sequence[Schema]"
Skip = Callable[[str, str], None]  # is told the name of an odd entry, and 'cause: detail'


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not HALVES.search(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGE


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and isfinite(value))


def _is_file(value: Any) -> bool:
    """Whether a disk takes it: no null byte, and no part that is too long."""
    fits = _is_text(value) and bool(value) and "\0" not in value
    return fits and len(value) <= 1024 and all(len(part.encode()) < 256 for part in value.split("/"))


TEXT = FieldType("a text", _is_text)
FILE = FieldType("a file name", _is_file)
WHOLE = FieldType("a whole number", _is_whole)
DIGITS = FieldType(
    "a whole number", lambda value: _is_whole(value) or (isinstance(value, str) and value.isdecimal() and len(value) < 19)
)
NUMBER = FieldType("a number", _is_number)
ID = FieldType("a number or text", lambda value: _is_whole(value) or _is_text(value))


def optional(field: FieldType) -> FieldType:
    """The same, or null; a mapping may lack it."""
    return FieldType(field.name, lambda value: value is None or field.fits(value))


def below(count: int) -> FieldType:
    """A whole number from 0 to count - 1."""
    return FieldType(f"a whole number below {count}", lambda value: _is_whole(value) and 0 <= value < count)


def problem(value: Any, schema: Schema) -> str:
    """What is odd about a value, to stand after its name: '.caption is null, not a text'; '' where nothing is."""
    if isinstance(schema, FieldType):
        return "" if schema.fits(value) else f" is {shown(value)}, not {schema.name}"
    if not isinstance(schema, Mapping):
        if not isinstance(value, list):
            return f" is {shown(value)}, not a list"
        if isinstance(schema, tuple) and len(value) != len(schema):
            return f" is a list of {len(value)}, not of {len(schema)}"
        return next((f"[{i}]{odd}" for i, item in enumerate(value) if (odd := problem(item, schema[0]))), "")
    if not isinstance(value, dict):
        return f" is {shown(value)}, not an object with {', '.join(schema)}"
    for name, field in schema.items():
        if name not in value and not (isinstance(field, FieldType) and field.fits(None)):
            return f" lacks {name}"
        if odd := problem(value.get(name), field):
            return f".{name}{odd}"
    return ""


def shown(value: Any) -> str:
    """A value of JSON in a message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return "a text with half a character" if HALVES.search(value) else f"the text {value[:40]!r}"
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'}{'' if value else ' of nothing'}"
    return "a number that is too large" if isinstance(value, int) and abs(value) >= LARGE else str(value)[:40]


def fitting(path: Path, name: str, entries: Any, schema: Schema, skip: Skip | None = None) -> list[Any]:
    """The entries of a list, called name, that fit a schema.

    skip is told of each of the others. Without it they are warned of, and too many of them refuse the file (odd_allowed).
    Raises UserError for those, and where there is no list.
    """
    if not isinstance(entries, list):
        raise UserError(f"{path}: {name} is {shown(entries)}, not a list; fetch the file again")
    odd = {number: cause for number, entry in enumerate(entries) if (cause := problem(entry, schema))}
    leave_out(path, [f"{name}[{number}]{cause}" for number, cause in odd.items()], len(entries), skip)
    return [entry for number, entry in enumerate(entries) if number not in odd]


def by_id(path: Path, name: str, entries: list[dict[str, Any]], skip: Skip | None = None) -> dict[Any, dict[str, Any]]:
    """Entries, called name, by their `id`. Those that share one are odd, all of them, since nobody knows which is meant.

    So files that were put together are refused where their ids are not apart. skip: as of fitting, which also says what is
    raised.
    """
    found: dict[Any, dict[str, Any]] = {}
    twice: dict[Any, dict[str, Any]] = {}
    for entry in entries:
        if found.setdefault(entry["id"], entry) != entry:
            twice[entry["id"]] = entry
    leave_out(path, [f"{name} of the id {shown(key)}, which several have" for key in twice], len(entries), skip)
    return {key: entry for key, entry in found.items() if key not in twice}


def leave_out(path: Path, odd: list[str], count: int, skip: Skip | None = None) -> None:
    """Tell of odd entries, as fitting does; count: of all entries."""
    if skip:
        for name, _, why in (cause.partition(" ") for cause in odd):
            skip(name, f"odd entry: {why}")
        return
    told = f"{path}: {len(odd)} of {count} entries are odd ({odd[0]})" if odd else ""
    allowed = _allowed.get()
    if len(odd) > (MAX_ODD if allowed is None else allowed.share) * count:
        more = "" if allowed is None else ", or allow more by --max-lost (data.max_lost in training)"
        raise UserError(f"{told}; fetch the file again, or correct it{more}")
    if odd:
        warnings.warn(f"{told} and left out", stacklevel=3)
    if allowed is not None:
        allowed.count += len(odd)
