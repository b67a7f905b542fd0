"""Trained parameters as a folder, to keep, hand on and publish.

It holds config.json (format and version, the arguments that build the model around the towers' names, ids of the added
tokens, the fingerprint, the digest of the weights, what is known of the training), model.safetensors and README.md, its
card. The towers are not in it, and nothing here needs them. Of FROMAGe these are 5.5 million numbers at full size: 11 MB in
bfloat16, 22 MB in float32. Of an Octopus whose language model was trained, its parameters are in it too: adapters, or all
of them.

A folder in float32 gives back the model bit for bit, fingerprint included. In bfloat16 the parameters are rounded once:
the fingerprint on record, and that of every index built with the folder, is the rounded model's. Saving it again rounds
nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fromage.checkpoints.card import checked, fromage_card, octopus_card
from fromage.config import DType, FromageConfig, ModelConfig, OctopusConfig, check_kind, kinds
from fromage.errors import BrokenSample, UserError, reason
from fromage.identity import OWN, FolderKind
from fromage.io import as_json, check_new, decode_text, parse_json, write_files
from fromage.printable import printable
from fromage.processor import multiplies_bfloat16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"  # a dtype that the machine decides
TOWERS = ("lm.", "vision.")  # prefixes of parameters that are never saved
FROMAGE, OCTOPUS = "fromage", "octopus"  # kinds of models that a folder may hold
VERSION = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
GENERATION = "generation.json"  # how to talk with the model, beside any kind of weights; see fromage.generation.preset
GENERATION_SIZE = 1 << 16  # bytes of it, at most
PARAMETERS = FolderKind(CONFIG, "trained parameters", keys=frozenset({"added_tokens", "fingerprint", "sha256"}))
BESIDE: dict[str, Any] = {"added_tokens": dict, "fingerprint": str | None, "sha256": str, "about": dict}  # the settings


@dataclass(frozen=True)
class ConfigLayout:
    """What config.json says of one kind of model.

    Attributes:
        name: the model's, for people.
        config: its settings, and their values where an older folder does not name them.
        card: text of the model card, for the config and the number of parameters; see fromage.checkpoints.card.
    """

    name: str
    config: type[ModelConfig]
    card: Callable[[Mapping[str, Any], int], str]

    @property
    def not_said(self) -> dict[str, Any]:
        """The settings that a folder need not name."""
        return {f.name: f.default for f in fields(self.config) if f.name not in {*self.config.NEEDED, *NOT_KEPT}}


NOT_KEPT = {"random_weights"}  # settings that no folder holds, since what has them cannot be loaded again
LAYOUTS = {
    FROMAGE: ConfigLayout("FROMAGe", FromageConfig, fromage_card),
    OCTOPUS: ConfigLayout("Octopus", OctopusConfig, octopus_card),
}


@dataclass(frozen=True)
class Saved:
    """What every format on disk holds, towers aside.

    Attributes:
        source: where it was read, for messages.
        tensors: the trained parameters by their names in the model, in the dtypes of the file.
        settings: arguments of the model's `load` that build it around them; of a Lightning checkpoint, its hyperparameters.
        added_tokens: ids of <|image|>, [RET] and the like; empty in a Lightning checkpoint.
        fingerprint: of the model with these parameters; None where it was written without its towers.
        generation: content of generation.json, not checked; None where there is none.
        kind: of the model, one of LAYOUTS.
        about: what is known of their training, for the model card; see fromage.checkpoints.card.
    """

    source: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    added_tokens: dict[str, int]
    fingerprint: str | None = None
    generation: dict[str, Any] | None = None
    kind: str = FROMAGE
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """The dtype that holds every tensor without rounding."""
        return str(reduce(torch.promote_types, {value.dtype for value in self.tensors.values()})).removeprefix("torch.")


def read_folder(folder: Path) -> Saved:
    """A folder as write_folder leaves it. Raises UserError where it is anything else, torn or altered."""
    config = _read_config(folder)
    try:
        content = (folder / WEIGHTS).read_bytes()
        if hashlib.sha256(content).hexdigest() != config["sha256"]:
            raise BrokenSample(f"its digest is not the one in {CONFIG}")
        tensors = safetensors.torch.load(content)
    except (OSError, ValueError, BrokenSample, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: missing or damaged ({reason(error)}); fetch or export it again") from error
    settings = {name: config[name] for name in config if name not in OWN | BESIDE.keys()}
    beside = config["added_tokens"], config["fingerprint"], read_generation(folder), config["format"]
    return Saved(str(folder), tensors, settings, *beside, about=checked(config["about"]))


def read_generation(folder: Path) -> dict[str, Any] | None:
    """The JSON object in generation.json; None where there is none. Raises UserError for anything else."""
    path = folder / GENERATION
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            content = file.read(GENERATION_SIZE + 1)
        if len(content) > GENERATION_SIZE:
            raise BrokenSample(f"larger than {GENERATION_SIZE >> 10} KiB")
    except (OSError, BrokenSample) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); mend it, or remove it") from error
    stored = parse_json(decode_text(content, path), path, "another folder, or remove it")
    if not isinstance(stored, dict):
        raise UserError(f"{path}: cannot be read (no JSON object); mend it, or remove it")
    return stored


def _read_config(folder: Path) -> dict[str, Any]:
    hint = "give the .ckpt within" if any(folder.glob("*.ckpt")) else "fromage import and fromage export write them"
    kind = replace(PARAMETERS, again=hint)
    config = kind.read(folder)
    layout = next((known for name, known in LAYOUTS.items() if config.get("format") == name), None)
    if layout is None or config.get("version") != VERSION:
        raise kind.unreadable(folder, "of another format or version")
    config = {"about": {}} | layout.not_said | config
    if missing := [name for name in (*layout.config.NEEDED, *BESIDE) if name not in config]:
        raise kind.unreadable(folder, f"no {missing[0]!r}")
    known = {name: kind for name, kind in kinds(layout.config).items() if name not in NOT_KEPT} | BESIDE
    if unknown := sorted(config.keys() - known.keys() - OWN):
        told = f"has the setting {unknown[0]!r}, which this version does not know"
        raise replace(kind, again="update fromage, or remove that line").unreadable(folder, told)
    for name in (name for name in known if name in config):
        try:
            check_kind(name, config[name], known[name])
        except UserError as error:
            raise kind.unreadable(folder, str(error)) from error
    return config


def write_folder(
    saved: Saved, folder: str | Path, overwrite: bool = False, beside: Mapping[str, bytes] = MappingProxyType({})
) -> None:
    """Write a folder; with overwrite one that is there keeps its card, and files of others, and is replaced in all else.

    beside: further files by name, or a card in place of ours.

    Each file is whole. What is killed between the two leaves new weights under the old config, which read_folder refuses.
    Raises UserError where such a folder is there already, or something else, and where it cannot be written.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).exists() or (folder / CONFIG).exists():
        PARAMETERS.require_own(folder)  # of any kind of model
    for name in (CONFIG, WEIGHTS):
        check_new(folder / name, overwrite)
    count = sum(value.numel() for value in saved.tensors.values())
    content = safetensors.torch.save(saved.tensors, {"format": "pt"})
    layout = LAYOUTS[saved.kind]
    config = {"format": saved.kind, "version": VERSION} | layout.not_said
    config |= {name: value for name, value in saved.settings.items() if name in kinds(layout.config).keys() - NOT_KEPT}
    config |= {"added_tokens": saved.added_tokens, "fingerprint": saved.fingerprint}
    config |= {"about": saved.about} if saved.about else {}
    config |= {"sha256": hashlib.sha256(content).hexdigest()}
    files = {WEIGHTS: content, CARD: printable(layout.card(config, count), "\n").encode(), CONFIG: as_json(config)}
    files |= {GENERATION: as_json(saved.generation)} if saved.generation else {}
    files |= beside
    kept = {name: data for name, data in files.items() if name != CARD or not (folder / CARD).exists()}
    write_files(folder, kept, remove=() if saved.generation else [GENERATION])  # of the model that is replaced


def dtype_name(name: str) -> DType:
    """A name of DTYPES, or UserError; auto is bfloat16 where this machine multiplies in it, and float32 elsewhere."""
    if name == AUTO:
        return "bfloat16" if multiplies_bfloat16() else "float32"
    if name not in DTYPES:
        raise UserError(f"dtype {name}: must be one of {', '.join((*DTYPES, AUTO))}")
    return cast(DType, name)


def parameter_shapes(tensors: Mapping[str, Tensor], k: int, q: int, r: int = 1) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters by name: W_c (d k, m), W_t (q, d), W_i (q, m), e_RET (r, d), logit_scale ().

    d and m are read off the tensors of e_RET and W_i; 0 where these are missing.
    """
    d, m = (tensors[name].shape[-1:].numel() if name in tensors else 0 for name in ("ret.input", "image_head.weight"))
    shapes: dict[str, tuple[int, ...]] = {"ret.input": (r, d), "logit_scale": ()}
    for name, (rows, width) in {"visual_prefix": (d * k, m), "text_head": (q, d), "image_head": (q, m)}.items():
        shapes |= {f"{name}.weight": (rows, width), f"{name}.bias": (rows,)}
    return shapes


def differences(tensors: Mapping[str, Tensor], want: Mapping[str, tuple[int, ...]]) -> str:
    """How names and shapes differ from those wanted, in words: the first three; '' if they do not."""
    have = {name: tuple(value.shape) for name, value in tensors.items()}
    differs = {name for name in have.keys() | want.keys() if have.get(name) != want.get(name)}
    ordered = sorted(differs, key=lambda name: (name in have and name in want, name))  # a missing name explains most
    return "; ".join(f"{name} is {have.get(name, 'missing')}, wanted {want.get(name, 'none')}" for name in ordered[:3])
