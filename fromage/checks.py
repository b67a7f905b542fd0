"""What a user gives: numbers of the right kind and within their bounds, lists or one item of them, addresses."""

from __future__ import annotations

import re
from math import inf
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from fromage.errors import UserError

HALVES = re.compile("[\ud800-\udfff]")  # surrogates: halves of a character in UTF-16, no characters themselves
ADDRESSES = ("http://", "https://")  # what an address on the web begins with


def check_whole(name: str, value: object, least: float, most: float = inf) -> None:
    """Raise UserError unless a value is a whole number within these bounds, which belong to it."""
    _check(name, value, isinstance(value, Integral), f"a whole number from {least:g}", least, most)


def check_real(name: str, value: object, least: float, most: float, besides: str = "") -> None:
    """The same for any number; besides: what else may stand there, for the message."""
    _check(name, value, isinstance(value, Real), f"{besides}a number from {least:g}", least, most)


def _check(name: str, value: object, is_number: bool, wanted: str, least: float, most: float) -> None:
    if not is_number or not least <= value <= most:  # type: ignore[operator]
        raise UserError(f"{name} is {value!r}; it must be {wanted} {'on' if most == inf else f'to {most:g}'}")


def as_list(items: Any, *alone: type) -> list[Any]:
    """Items as a list: a text or path on its own is one item, never its letters. alone: further types of single items."""
    return [items] if isinstance(items, (str, Path, *alone)) else list(items)
