"""Checkpoints of the trained parameters alone."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fromage.errors import UserError, first_line
from fromage.model import TOWERS, Fromage

PREFIX = "model."


def trained_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Lightning state dict without the frozen towers."""
    return {name: value for name, value in state.items() if not name.startswith(tuple(PREFIX + tower for tower in TOWERS))}


def check_checkpoint(checkpoint: dict[str, Any], model: Fromage) -> None:
    """Raise UserError unless the checkpoint holds just the model's trained parameters, in their shapes."""
    have = {name.removeprefix(PREFIX): tuple(value.shape) for name, value in checkpoint.get("state_dict", {}).items()}
    want = {name: tuple(p.shape) for name, p in model.trained().items()}
    if have == want:
        return
    differs = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
    parts = "; ".join(f"{name} is {have.get(name, 'missing')}, wanted {want.get(name, 'none')}" for name in differs[:3])
    raise UserError(f"checkpoint of another architecture ({parts}): give the lm, vision, k and q it was trained with")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint of ours, on the CPU. Raises UserError when it is missing, torn or not one."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file; `lightning fit` writes them under its run folder")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"checkpoint {path}: unreadable or not a checkpoint ({first_line(error)[:120]})") from error
    if not isinstance(checkpoint, dict) or "hyper_parameters" not in checkpoint:
        raise UserError(f"checkpoint {path}: not written by `lightning fit`")
    return checkpoint


def from_hyperparameters(h: Mapping[str, Any]) -> Fromage:
    """A fresh model as the hyperparameters of a FromageModule describe it."""
    names = ("lm", "vision", "vision_weights", "k", "q", "dtype", "random_weights", "seed")
    return Fromage.load(**{name: h[name] for name in names})


def load_model(path: str | Path, device: str = "cpu") -> Fromage:
    """The model of a checkpoint, towers and all, in eval mode."""
    checkpoint = read_checkpoint(path)
    model = from_hyperparameters(checkpoint["hyper_parameters"])
    check_checkpoint(checkpoint, model)
    state = {name.removeprefix(PREFIX): value for name, value in checkpoint["state_dict"].items()}
    model.load_state_dict(state, strict=False)
    return model.to(device).eval()
