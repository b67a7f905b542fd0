"""Trained parameters from wherever they are: a Lightning checkpoint, a folder (fromage.model_folder), the model hub."""

from __future__ import annotations

import inspect
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from fromage.backbones import DTYPES, look_for_hub
from fromage.errors import UserError, first_line
from fromage.model import Fromage
from fromage.model_folder import CONFIG, WEIGHTS, Saved, read_folder
from fromage.picture_reader import TOWERS

PREFIX = "model."
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.ckpt)")
HUB_OPTIONS = {"revision", "token", "cache_dir", "force_download", "local_files_only"}


def load_model(path: str | Path, device: str = "cpu", **options: Any) -> Fromage:
    """The model of a Lightning checkpoint, of a folder or of a name on the hub, towers and all, in eval mode.

    options: arguments of Fromage.load in place of those on record (dtype, quantize, lm, vision, vision_weights; None leaves
    them), and those of Fromage.from_pretrained for the hub. Raises UserError for what is missing, damaged or does not fit.
    """
    hub = {name: options.pop(name) for name in HUB_OPTIONS & options.keys()}
    return build(read_saved(path, **hub), device, **options)


def build(saved: Saved, device: str = "cpu", **options: Any) -> Fromage:
    """Load the towers and put the trained parameters between them; arguments as of load_model."""
    options = {name: value for name, value in options.items() if value is not None}
    dtype = str(options.get("dtype", saved.settings.get("dtype", "float32"))).removeprefix("torch.")
    elsewhere = {"vision_weights": None} if "vision" in options else {}
    check_device(device)
    model = Fromage.load(**(saved.settings | elsewhere | options | {"dtype": dtype_name(dtype)}))
    check_trained(saved.tensors, model, saved.source)
    ids = {name: saved.added_tokens.get(name, own) for name, own in _added_tokens(model).items()}
    if ids != _added_tokens(model):
        raise UserError(f"{saved.source}: made for {ids}, but {model.lm.name} has {_added_tokens(model)}; give its own lm")
    model.load_state_dict(saved.tensors, strict=False)
    if saved.added_tokens:  # not a Lightning checkpoint, whose float32 is for training on
        model.stored_dtype = saved.dtype
    if saved.fingerprint and not options and model.fingerprint() != saved.fingerprint:
        warnings.warn(f"{saved.source}: its image tower is not the one it was saved with; indexes differ too", stacklevel=3)
    return model.to(device).eval()


def check_device(device: str) -> None:
    """Raise UserError for a device that is not there: before towers are loaded, not after."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device}: there is none here that PyTorch can use; give cpu, cuda or mps") from error


def dtype_name(name: str) -> str:
    """A name of DTYPES, or UserError."""
    if name not in DTYPES:
        raise UserError(f"dtype {name}: must be one of {', '.join(DTYPES)}")
    return name


def _added_tokens(model: Fromage) -> dict[str, int]:
    return dict(model.tokenizer.added)


def describe(model: Fromage, dtype: str | None = None) -> Saved:
    """A model as it goes to disk, its trained parameters rounded to dtype (None: the model's stored_dtype)."""
    if not model.settings or model.settings["random_weights"]:
        raise UserError("a model whose towers have no name to load them by cannot be saved: build it by Fromage.load")
    kept = DTYPES[dtype_name(dtype or model.stored_dtype)]
    tensors = {name: p.detach().to("cpu", kept).contiguous() for name, p in model.trained().items()}
    return Saved("this model", tensors, dict(model.settings), _added_tokens(model), model.fingerprint(tensors))


def for_disk(saved: Saved, dtype: str | None = None) -> Saved:
    """Saved parameters complete and rounded to dtype, by default as they are.

    What a Lightning checkpoint leaves open, ids and fingerprint, its towers are loaded for; its default is bfloat16.
    """
    if not saved.added_tokens:
        return replace(describe(build(saved), dtype), source=saved.source)
    if dtype is None:
        return saved
    tensors = {name: value.to(DTYPES[dtype_name(dtype)]) for name, value in saved.tensors.items()}
    exact = all(torch.equal(tensors[name].float(), value.float()) for name, value in saved.tensors.items())
    return replace(saved, tensors=tensors, fingerprint=saved.fingerprint if exact else None)


def read_saved(path: str | Path, **hub: Any) -> Saved:
    """Trained parameters from any place load_model takes, without towers."""
    if Path(path).is_dir():
        return read_folder(Path(path))
    if Path(path).is_file() or not HUB_NAME.fullmatch(str(path)):
        return _from_lightning(path)
    look_for_hub()
    try:
        folder = snapshot_download(str(path), allow_patterns=[CONFIG, WEIGHTS], **hub)
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"checkpoint {path}: neither a file, nor a folder, nor within reach on the hub ({reason})"
        ) from error
    return read_folder(Path(folder))


# --- Lightning checkpoints ------------------------------------------------------------------------------------------


def trained_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Lightning state dict without the frozen towers."""
    return {name: value for name, value in state.items() if not name.startswith(tuple(PREFIX + tower for tower in TOWERS))}


def check_checkpoint(checkpoint: dict[str, Any], model: Fromage) -> None:
    """Raise UserError unless the checkpoint holds just the model's trained parameters, in their shapes."""
    state = checkpoint.get("state_dict", {})
    check_trained({name.removeprefix(PREFIX): value for name, value in state.items()}, model)


def check_trained(tensors: Mapping[str, Tensor], model: Fromage, source: str = "checkpoint") -> None:
    """Raise UserError unless these are the model's trained parameters, by name and shape."""
    differs = differences(tensors, {name: tuple(p.shape) for name, p in model.trained().items()})
    if not model.ret.tied and "ret.output_rows" not in tensors:
        differs += f"; {model.lm.name} does not tie its head to its embedding, so [RET] needs a row there too"
    if differs:
        raise UserError(f"{source}: of another architecture ({differs}); give the lm, vision, k and q it was trained with")


def differences(tensors: Mapping[str, Tensor], want: Mapping[str, tuple[int, ...]]) -> str:
    """How names and shapes differ from those wanted, in words: the first three; '' if they do not."""
    have = {name: tuple(value.shape) for name, value in tensors.items()}
    differs = {name for name in have.keys() | want.keys() if have.get(name) != want.get(name)}
    ordered = sorted(differs, key=lambda name: (name in have and name in want, name))  # a missing name explains most
    return "; ".join(f"{name} is {have.get(name, 'missing')}, wanted {want.get(name, 'none')}" for name in ordered[:3])


def read_pickle(path: Path) -> Any:
    """What torch.save wrote, on the CPU; nothing in it is executed. Raises UserError when it is torn or holds code."""
    try:
        if zipfile.is_zipfile(path) and (torn := zipfile.ZipFile(path).testzip()):
            raise zipfile.BadZipFile(f"{torn} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path}: is none, or asks to run code when it is read; not read") from error
    except Exception as error:  # a flipped bit can raise anything
        raise UserError(f"checkpoint {path}: unreadable or not a checkpoint ({first_line(error)[:120]})") from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint of ours, on the CPU. Raises UserError when it is missing, torn or not one."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file; `lightning fit` writes them under its run folder")
    checkpoint = read_pickle(path)
    if not isinstance(checkpoint, dict) or "hyper_parameters" not in checkpoint:
        raise UserError(f"checkpoint {path}: not written by `lightning fit`")
    return checkpoint


def _settings(h: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a FromageModule's hyperparameters that Fromage.load takes."""
    return {name: h[name] for name in inspect.signature(Fromage.load).parameters if name in h}


def from_hyperparameters(h: Mapping[str, Any]) -> Fromage:
    """A fresh model as the hyperparameters of a FromageModule describe it."""
    return Fromage.load(**_settings(h))


def _from_lightning(path: str | Path) -> Saved:
    checkpoint = read_checkpoint(path)
    tensors = {name.removeprefix(PREFIX): value for name, value in checkpoint.get("state_dict", {}).items()}
    return Saved(str(path), tensors, _settings(checkpoint["hyper_parameters"]), {})
