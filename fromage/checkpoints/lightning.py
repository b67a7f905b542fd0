"""Checkpoints that Lightning writes, read without running what is in them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fromage.checkpoints.format import TOWERS
from fromage.checkpoints.run_folder import checkpoint_file
from fromage.checkpoints.safe_pickle import read_pickle
from fromage.errors import UserError

PREFIX = "model."
TOWER_OPTIONS = ("lm", "vision", "vision_weights", "quantize")  # options that say what the trained parameters stand around


def trained_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Lightning state dict without the frozen towers."""
    return {name: value for name, value in state.items() if not name.startswith(tuple(PREFIX + tower for tower in TOWERS))}


def warn_of_other_towers(source: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn where options of training name other towers than those of now: they may have moved, and may be others."""
    names = [name for name in TOWER_OPTIONS if name in then and name in now and then[name] != now[name]]
    if names:
        told = "; ".join(f"model.{name} was {then[name]} and is {now[name]}" for name in names)
        warnings.warn(f"{source}: trained around other towers ({told}); it fits the same weights alone", stacklevel=3)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint of ours, on the CPU; of a run's folder the newest one.

    Raises UserError when it is missing, torn or not one.
    """
    path = checkpoint_file(path)
    checkpoint = read_pickle(path)
    if not isinstance(checkpoint, dict) or "hyper_parameters" not in checkpoint:
        raise UserError(f"checkpoint {path}: not written by `lightning fit`")
    return checkpoint
