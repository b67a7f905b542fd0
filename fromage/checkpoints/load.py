"""Trained parameters from wherever they are: a Lightning checkpoint, a folder of ours, the model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from fromage.checkpoints.card import about_run
from fromage.checkpoints.format import (
    CONFIG,
    FROMAGE,
    GENERATION,
    LAYOUTS,
    OCTOPUS,
    WEIGHTS,
    Saved,
    read_folder,
    read_generation,
)
from fromage.checkpoints.hub import HUB_NAME, stay_offline_without_hub
from fromage.checkpoints.lightning import PREFIX, read_checkpoint
from fromage.checkpoints.run_folder import checkpoint_file, last_checkpoint
from fromage.errors import UserError, first_line

HUB_OPTIONS = {"revision", "token", "cache_dir", "force_download", "local_files_only"}


def read_saved(path: str | Path, **hub: Any) -> Saved:
    """Trained parameters from any place load_model takes, without towers."""
    if _is_model_folder(Path(path)):
        return read_folder(Path(path))
    if Path(path).exists() or not HUB_NAME.fullmatch(str(path)):
        return _from_lightning(path)
    stay_offline_without_hub()
    try:
        folder = snapshot_download(str(path), allow_patterns=[CONFIG, WEIGHTS, GENERATION], **hub)
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"checkpoint {path}: neither a file, nor a folder, nor within reach on the hub ({reason})"
        ) from error
    return read_folder(Path(folder))


def folder_beside(path: str | Path) -> Path:
    """The folder whose generation.json is of the model at a path. Raises UserError for a name on the hub."""
    if _is_model_folder(Path(path)):
        return Path(path)
    if Path(path).exists() or not HUB_NAME.fullmatch(str(path)):
        return checkpoint_file(path).parent
    raise UserError(f"{path}: is a name on the hub; fetch it first: fromage export --ckpt {path} --out FOLDER")


def _is_model_folder(path: Path) -> bool:
    """Whether it is a folder of ours, not of a run's checkpoints."""
    return path.is_dir() and ((path / CONFIG).exists() or not last_checkpoint(path))


# --- Lightning checkpoints ------------------------------------------------------------------------------------------


def _from_lightning(path: str | Path) -> Saved:
    path = checkpoint_file(path)
    checkpoint = read_checkpoint(path)
    tensors = {name.removeprefix(PREFIX): value for name, value in checkpoint.get("state_dict", {}).items()}
    settings, generation = dict(checkpoint["hyper_parameters"]), read_generation(Path(path).parent)
    kind = checkpoint.get("kind") or (OCTOPUS if "stage" in settings else FROMAGE)  # older files do not say it
    if kind not in [*LAYOUTS]:
        raise UserError(f"checkpoint {path}: a model of kind {kind!r}, which this version does not know; update fromage")
    return Saved(str(path), tensors, settings, {}, generation=generation, kind=kind, about=about_run(checkpoint))
