"""A model and its file: build a model from saved parameters, and turn a model into what is saved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from fromage.checkpoints.card import licensed
from fromage.checkpoints.format import DTYPES, LAYOUTS, NOT_KEPT, TOWERS, Saved, dtype_name, write_folder
from fromage.checkpoints.load import HUB_OPTIONS, read_saved
from fromage.config import ModelConfig, kinds
from fromage.errors import UserError, first_line
from fromage.models.base import VisualPrefixLM
from fromage.models.language_model import LanguageModel
from fromage.models.vision.base import VisionTower
from fromage.processor import find_device


class Pretrained(VisualPrefixLM, ModelHubMixin):
    """A model that is saved as a folder (fromage.checkpoints.format), and loaded from one, a checkpoint or the hub.

    Attributes:
        kind: what folders call this kind of model, one of fromage.checkpoints.format.LAYOUTS.
        config_class: its options (fromage.config).
        config: what it was built from.
        loaded: whether its towers are those that the configuration names; a model of modules of one's own cannot be saved.
        generation: content of generation.json, how to talk with the model (fromage.generation.preset); None: nothing said.
        about: what is known of its training, for the model card (fromage.checkpoints.card).
        stored_dtype: dtype to which save_pretrained and push_to_hub round; after loading, the dtype of the file.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type[ModelConfig]]
    config: Any
    loaded = False
    generation: dict[str, Any] | None = None
    about: Mapping[str, Any] = MappingProxyType({})
    stored_dtype = "bfloat16"

    @classmethod
    def load(
        cls,
        lm: str = "toy",
        vision: str = "toy",
        vision_weights: str | None = None,
        dtype: str = "float32",
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """Build from names, as from_config does. options: further fields of its configuration, such as k and q."""
        towers: dict[str, Any] = {"lm": lm, "vision": vision, "vision_weights": vision_weights, "dtype": dtype}
        return cls.from_config(cls.config_class(**towers, **options), seed)

    @classmethod
    def from_config(cls, config: Any, seed: int = 0) -> Self:
        """Load the towers, and initialise the trained parameters anew.

        The same seed gives the same trained parameters, and the same towers where they have random weights. Raises UserError
        for towers that cannot be found, and for options that do not fit them.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(*cls.load_towers(config), config)
        model.loaded = True
        return model

    @classmethod
    def load_towers(cls, config: Any) -> tuple[LanguageModel, VisionTower]:
        """The two frozen towers of a configuration."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | Path, device: str = "cpu", dtype: str | torch.dtype | None = None, **options: Any
    ) -> Self:
        """The model of a folder, of a name on the Hugging Face hub or of a Lightning checkpoint, in eval mode.

        dtype: dtype of the towers (overrides the one of training). options: further fields of the configuration to override
        (lm, vision and vision_weights if the towers have moved; quantize: int8, nf4, or 'none' where training quantised),
        and revision, token, cache_dir, force_download and local_files_only of the hub. None is what training had. Raises
        UserError for missing or damaged files, and for an unknown device or option.
        """
        hub = {key: options.pop(key) for key in HUB_OPTIONS & options.keys()}
        return from_saved(cls, read_saved(name, **hub), device, dtype=dtype, **options)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        dtype: str | None = None,
        license: str | None = None,
        config: None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the trained parameters as a folder, see fromage.checkpoints.format; push_to_hub uploads what this writes.

        dtype: bfloat16 (11 MB of FROMAGe at full size), float16, or float32 (22 MB, lossless); by default stored_dtype.
        license: of the parameters, as the hub names it, such as apache-2.0; for push_to_hub model_card_kwargs={"license":
        ...}, which ModelHubMixin passes. The model card is written where there is none. config is ignored.
        """
        saved = to_saved(self, dtype)
        about = licensed(saved.about, license or (model_card_kwargs or {}).get("license"))
        write_folder(replace(saved, about=about), save_directory, overwrite=True)

    def push_to_hub(self, repo_id: str, **hub: Any) -> str:
        """Upload what save_pretrained writes to the Hugging Face hub; options of ModelHubMixin. Returns the address."""
        try:
            return super().push_to_hub(repo_id, **hub)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{repo_id}: not uploaded ({first_line(error)}); name a repository of your own, and log in by hf auth login"
            ) from error

    def saved_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are saved, by name."""
        return self.trained()

    @classmethod
    def upgraded(cls, saved: Saved) -> Saved:
        """Saved parameters and settings under today's names. Raises UserError for those that make no whole model."""
        return saved

    @classmethod
    def check_sizes(cls, config: Any, saved: Saved) -> None:
        """Raise UserError for a configuration that saved parameters do not fit, before a tower is loaded."""

    def load_parameters(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Load saved parameters. Raises UserError for those of another architecture; source: where they are from."""
        raise NotImplementedError


def from_saved(cls: type[Any], saved: Saved, device: str = "cpu", **options: Any) -> Any:
    """Load the towers and the saved parameters of a Pretrained; options override fields of the saved configuration.

    Raises UserError for an unknown device or option, for parameters of another kind of model or architecture, and for
    settings that are not of their type.
    """
    if saved.kind != cls.kind:
        is_of, wanted = LAYOUTS[saved.kind].name, LAYOUTS[cls.kind].name
        remedy = f"give a checkpoint of {wanted}, or a folder that `fromage export` made of one"
        raise UserError(f"{saved.source}: is of {is_of}, and not of {wanted}; {remedy}")
    saved = cls.upgraded(saved)
    options = {name: value for name, value in options.items() if value is not None}
    known = kinds(cls.config_class)
    if unknown := sorted(options.keys() - known.keys()):
        names = ", ".join(sorted({"device", *known, *HUB_OPTIONS}))
        raise UserError(f"{unknown[0]}: no option of {cls.__name__}.from_pretrained; there are {names}")
    device = find_device(device)
    config = _config(cls, saved, options)
    check_numbers(saved.tensors, saved.source)
    cls.check_sizes(config, saved)
    model = cls.from_config(config, saved.settings.get("seed", 0))  # a run's, for towers with random weights
    model.load_parameters(saved.tensors, saved.source)
    if saved.added_tokens and (missing := sorted(model.trained().keys() - saved.tensors.keys())):
        raise UserError(f"{saved.source}: lacks {missing[0]}; fetch or export it again")
    own = model.tokenizer.added
    if other := {token: number for token, number in saved.added_tokens.items() if own.get(token, number) != number}:
        here = {token: own[token] for token in other}
        raise UserError(f"{saved.source}: made for {other}, but {model.lm.name} has {here}; give its own lm")
    model.generation, model.about = saved.generation, saved.about
    if saved.added_tokens:  # not a Lightning checkpoint, which is float32 for further training
        model.stored_dtype = saved.dtype
    if saved.fingerprint and not options and model.fingerprint() != saved.fingerprint:
        told = "its vision tower or language model is not the one it was saved with; indexes differ too"
        warnings.warn(f"{saved.source}: {told}", stacklevel=3)
    return model.to(device).eval()


def check_numbers(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError unless saved parameters are finite numbers, as many as they claim: nothing is built before that."""
    for name, value in tensors.items():
        if value.nbytes > value.untyped_storage().nbytes():
            raise UserError(f"{source}: {name} claims more numbers than are stored; fetch it again, or train again")
        if not value.is_floating_point() or not value.isfinite().all():
            raise UserError(f"{source}: {name} holds no finite numbers ({value.dtype}); fetch it again, or train again")


def to_saved(model: Pretrained, dtype: str | None = None) -> Saved:
    """What is saved of a model: trained parameters rounded to dtype (None: the model's stored_dtype), settings, ids."""
    if not model.loaded or model.config.random_weights:
        told = f"build it by {type(model).__name__}.load"
        raise UserError(f"a model whose towers cannot be loaded by name cannot be saved: {told}")
    kept = DTYPES[dtype_name(dtype or model.stored_dtype)]
    tensors = {name: p.detach().to("cpu", kept).contiguous() for name, p in model.saved_parameters().items()}
    # The digest of a tower is of samples in bfloat16: rounding to float16 before changes it.
    exact = kept is not torch.float16 or not any(name.startswith(TOWERS) for name in tensors)
    fingerprint = model.fingerprint(tensors) if exact else None
    settings = {name: value for name, value in vars(model.config).items() if name not in NOT_KEPT}
    beside = dict(model.tokenizer.added), fingerprint, model.generation, model.kind
    return Saved("this model", tensors, settings, *beside, about=dict(model.about))


def for_disk(cls: type[Pretrained], saved: Saved, dtype: str | None = None) -> Saved:
    """Saved parameters with ids and fingerprint, rounded to dtype (None: unchanged).

    A Lightning checkpoint holds neither ids nor fingerprint: its towers are loaded to get them, and None means bfloat16.
    """
    if not saved.added_tokens:
        return replace(to_saved(from_saved(cls, saved), dtype), source=saved.source)
    if dtype is None:
        return saved
    tensors = {name: value.to(DTYPES[dtype_name(dtype)]) for name, value in saved.tensors.items()}
    exact = all(torch.equal(tensors[name].float(), value.float()) for name, value in saved.tensors.items())
    return replace(saved, tensors=tensors, fingerprint=saved.fingerprint if exact else None)


def _config(cls: type[Pretrained], saved: Saved, options: Mapping[str, Any]) -> ModelConfig:
    """The configuration of saved parameters, under options that override it. Raises UserError for impossible values."""
    known = kinds(cls.config_class)
    settings = {name: value for name, value in saved.settings.items() if name in known}
    elsewhere = {"vision_weights": None} if "vision" in options else {}
    given = settings | elsewhere | dict(options)
    given["quantize"] = None if given.get("quantize") == "none" else given.get("quantize")
    try:
        return cls.config_class(**given | {"dtype": str(given.get("dtype", "float32")).removeprefix("torch.")})
    except UserError as error:
        raise UserError(f"{saved.source}: {error}") from error
