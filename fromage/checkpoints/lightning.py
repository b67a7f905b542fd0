"""Checkpoints that Lightning writes, read without running what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fromage.checkpoints.format import TOWERS
from fromage.checkpoints.safe_pickle import read_pickle
from fromage.errors import UserError

PREFIX = "model."
LAST, BEFORE = "last.ckpt", "last-1.ckpt"
PLACES = ("", "checkpoints/", "version_*/checkpoints/")  # in a folder of checkpoints, of a run, of a run's versions


def trained_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Lightning state dict without the frozen towers."""
    return {name: value for name, value in state.items() if not name.startswith(tuple(PREFIX + tower for tower in TOWERS))}


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint in a folder of checkpoints, of a run or of its versions, the newest; None where there is none."""
    for name in (LAST, BEFORE):
        if found := [path for place in PLACES for path in folder.glob(place + name)]:
            return max(found, key=lambda path: path.stat().st_mtime_ns)
    return None


def checkpoint_file(path: str | Path) -> Path:
    """The file that a path names, in a run's folder the newest. Raises UserError where there is none."""
    path = Path(path)
    found = path if path.is_file() else last_checkpoint(path)
    if found is None:
        other = last_checkpoint(path.parent.parent)
        hint = f"the newest of this run is {other}" if other else "`lightning fit` writes them under its run folder"
        raise UserError(f"checkpoint {path}: no such file{' in it' if path.is_dir() else ''}; {hint}")
    return found


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint of ours, on the CPU; of a run's folder the newest one.

    Raises UserError when it is missing, torn or not one.
    """
    path = checkpoint_file(path)
    checkpoint = read_pickle(path)
    if not isinstance(checkpoint, dict) or "hyper_parameters" not in checkpoint:
        raise UserError(f"checkpoint {path}: not written by `lightning fit`")
    return checkpoint
