"""What a verb is: a function of parsed arguments, and the options argparse is to look for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

Option = tuple[tuple[str, ...], dict[str, Any]]  # names and settings of add_argument
Verbs = dict[tuple[str, ...], tuple[Callable[[argparse.Namespace], None], list[Option]]]  # words -> function, options


def option(*names: str, **settings: Any) -> Option:
    """An argument, in the words of argparse's add_argument."""
    return names, settings


OUT = option("--out", type=Path, required=True, help="folder to write")
DEVICE = option("--device", default="cpu", help="cpu, cuda or mps")
