"""What a verb is: a function of parsed arguments, and the options argparse is to look for, with what it makes of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fromage.errors import UserError

Option = tuple[tuple[str, ...], dict[str, Any]]  # names and settings of add_argument
Verbs = dict[tuple[str, ...], tuple[Callable[[argparse.Namespace], None], list[Option]]]  # words -> function, options


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def natural(text: str) -> int:
    """A whole number from 0 on."""
    if (value := int(text)) < 0:
        raise ValueError
    return value


def share(text: str) -> float:
    """A number from 0 on."""
    if not 0 <= (value := float(text)) < float("inf"):
        raise ValueError
    return value


def out_folder(text: str) -> Path:
    """A folder to write, later. Raises UserError now where it can be neither made nor written to."""
    path = Path(text)
    there = next(p for p in (path, *path.parents) if os.access(p, os.F_OK))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{path}: {there} is no folder that can be written to; name another place")
    return path


def out_file(text: str) -> Path:
    """A file to write, likewise; its folder is made when it is written."""
    path = Path(text)
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is there, and no file; name another")
    return out_folder(str(path.parent)) / path.name


def out_png(text: str) -> Path:
    """An image to draw, likewise."""
    if not text.lower().endswith(".png"):
        raise UserError(f"{text}: name a file that ends in .png")
    return out_file(text)


def save_json(path: Path, value: Any) -> None:
    """Write JSON, whole. Raises UserError where the disk does not take it."""
    from fromage.io import as_json, write_files

    write_files(path.parent, {path.name: as_json(value)})


def option(*names: str, **settings: Any) -> Option:
    """An argument, in the words of argparse's add_argument; its help tells its default. It takes no empty words."""
    if settings.get("default") not in (None, []) and "help" in settings:
        settings["help"] += " (%(default)s)"
    if "action" not in settings or settings["action"] == "append":
        settings["type"] = _filled(settings.get("type", str))
    return names, settings


def _filled(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """What makes a kind of value of words that are there: Path("") would be the current folder."""

    def value(text: str) -> Any:
        if not text:
            raise argparse.ArgumentTypeError("is empty; name something, or leave it out")
        return kind(text)

    value.__name__ = kind.__name__
    return value


OUT = option("--out", type=out_folder, required=True, help="folder to write")
JSON = option("--json", type=out_file, help="write all figures into this file")
QUESTION = option("--question", default="where is {}?", help="what an expression is put into, in place of {}")
DEVICE = option("--device", default="cpu", help="cpu, cuda or mps")
