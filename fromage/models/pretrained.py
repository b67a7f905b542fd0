"""A model and its file: build a model from saved parameters, and turn a model into what is saved."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fromage.checkpoints.format import DTYPES, Saved, differences, dtype_name, parameter_shapes
from fromage.checkpoints.lightning import PREFIX
from fromage.errors import UserError
from fromage.models.frozen import find_device

if TYPE_CHECKING:
    from fromage.models.fromage import Fromage


def build(cls: type[Fromage], saved: Saved, device: str = "cpu", **options: Any) -> Fromage:
    """Load the towers and the saved parameters; options override the saved arguments of cls.load.

    Raises UserError for an unknown device and for parameters of another architecture.
    """
    options = {name: value for name, value in options.items() if value is not None}
    dtype = str(options.get("dtype", saved.settings.get("dtype", "float32"))).removeprefix("torch.")
    elsewhere = {"vision_weights": None} if "vision" in options else {}
    device = find_device(device)
    settings = _arguments(cls, saved.settings) | elsewhere | options
    check_sizes(saved.tensors, settings.get("k"), settings.get("q"), saved.source)
    model = cls.load(**(settings | {"dtype": dtype_name(dtype)}))
    check_trained(saved.tensors, model, saved.source)
    ids = {name: saved.added_tokens.get(name, own) for name, own in _added_tokens(model).items()}
    if ids != _added_tokens(model):
        raise UserError(f"{saved.source}: made for {ids}, but {model.lm.name} has {_added_tokens(model)}; give its own lm")
    model.load_state_dict(saved.tensors, strict=False)
    model.generation = saved.generation
    if saved.added_tokens:  # not a Lightning checkpoint, which is float32 for further training
        model.stored_dtype = saved.dtype
    if saved.fingerprint and not options and model.fingerprint() != saved.fingerprint:
        warnings.warn(f"{saved.source}: its vision tower is not the one it was saved with; indexes differ too", stacklevel=3)
    return model.to(device).eval()


def check_sizes(tensors: Mapping[str, Tensor], k: Any, q: Any, source: str) -> None:
    """Raise UserError unless saved parameters are finite numbers of the k and q on record: nothing is built before that."""
    for name, value in tensors.items():
        if value.nbytes > value.untyped_storage().nbytes():
            raise UserError(f"{source}: {name} claims more numbers than are stored; fetch it again, or train anew")
        if not value.is_floating_point() or not value.isfinite().all():
            raise UserError(f"{source}: {name} holds no finite numbers ({value.dtype}); fetch it again, or train anew")
    if not (type(k) is type(q) is int and min(k, q) > 0):
        raise UserError(f"{source}: k {k!r} and q {q!r} are not both numbers from 1; give those it was trained with")
    want = parameter_shapes(tensors, k, q)
    if differs := differences({name: value for name, value in tensors.items() if name in want}, want):
        raise UserError(f"{source}: of another architecture ({differs}); give the lm, vision, k and q it was trained with")


def _added_tokens(model: Fromage) -> dict[str, int]:
    return dict(model.tokenizer.added)


def describe(model: Fromage, dtype: str | None = None) -> Saved:
    """What is saved of a model: trained parameters rounded to dtype (None: the model's stored_dtype), settings, ids."""
    if not model.settings or model.settings["random_weights"]:
        raise UserError("a model whose towers cannot be loaded by name cannot be saved: build it by Fromage.load")
    kept = DTYPES[dtype_name(dtype or model.stored_dtype)]
    tensors = {name: p.detach().to("cpu", kept).contiguous() for name, p in model.trained().items()}
    fingerprint, generation = model.fingerprint(tensors), model.generation
    return Saved("this model", tensors, dict(model.settings), _added_tokens(model), fingerprint, generation)


def check_checkpoint(checkpoint: dict[str, Any], model: Fromage) -> None:
    """Raise UserError unless the checkpoint holds exactly the model's trained parameters, by name and shape."""
    state = checkpoint.get("state_dict", {})
    check_trained({name.removeprefix(PREFIX): value for name, value in state.items()}, model)


def check_trained(tensors: Mapping[str, Tensor], model: Fromage, source: str = "checkpoint") -> None:
    """Raise UserError unless these are the model's trained parameters, by name and shape."""
    differs = differences(tensors, {name: tuple(p.shape) for name, p in model.trained().items()})
    if not model.ret.tied and "ret.output_rows" not in tensors:
        differs += f"; {model.lm.name} does not tie its head to its embedding, so [RET] needs a row there too"
    if differs:
        raise UserError(f"{source}: of another architecture ({differs}); give the lm, vision, k and q it was trained with")


def from_hyperparameters(cls: type[Fromage], h: Mapping[str, Any]) -> Fromage:
    """A newly initialised model, from the hyperparameters of a Lightning module."""
    return cls.load(**_arguments(cls, h))


def _arguments(cls: type[Fromage], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are arguments of cls.load."""
    return {name: settings[name] for name in inspect.signature(cls.load).parameters if name in settings}
