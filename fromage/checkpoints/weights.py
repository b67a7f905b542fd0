"""Weights of a whole tower in one file, a torch file or safetensors."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fromage.checkpoints.safe_pickle import read_pickle
from fromage.errors import UserError, reason

WRAPPED = ("state_dict_ema", "state_dict", "model_ema", "model")  # where files of trainings have them


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, by name, on the CPU; nothing in it is executed.

    A safetensors file is known by its content. Raises UserError for a file that is missing, damaged, or holds no weights.
    """
    try:
        with Path(path).open("rb") as file:
            start = file.read(9)
        found = safetensors.torch.load_file(path) if start[8:] == b"{" else read_pickle(Path(path), foreign=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {path}: missing or damaged ({reason(error)}); fetch them again") from error
    inner = next((found[name] for name in WRAPPED if name in found), found) if isinstance(found, dict) else None
    if not isinstance(inner, dict) or not inner or not all(isinstance(value, Tensor) for value in inner.values()):
        raise UserError(f"weights {path}: hold no tensors by name; give a torch file or safetensors of a model's weights")
    return {str(name).removeprefix("module."): value for name, value in inner.items()}
