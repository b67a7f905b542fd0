"""The registry of vision towers: a prefix such as timm: names the kind; names without a known prefix are open_clip's."""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch

from fromage.errors import UserError
from fromage.models import towers
from fromage.models.vision.base import VisionTower
from fromage.models.vision.huggingface import HfTower
from fromage.models.vision.open_clip import OpenClipTower
from fromage.models.vision.timm import TimmTower

KINDS: dict[str, type[VisionTower]] = {"timm": TimmTower, "hf": HfTower}


def load_vision(name: str, weights: str | None = None, dtype: str = "float32", random_weights: bool = False) -> VisionTower:
    """Load and freeze a vision tower by its name in a configuration (fromage.models.vision.base lists the kinds).

    weights: a tag of open_clip or a file, where the name does not include them; random_weights builds the architecture
    alone. Raises UserError for unknown names, and for weights that are neither on disk nor on the hub.
    """
    return _named(name, _kind(name).load(_place(name), _weights(name, weights), dtype, random_weights))


def load_patches(
    name: str, weights: str | None = None, layer: int = -2, dtype: str = "float32", random_weights: bool = False
) -> VisionTower:
    """The same tower read at the patches of a layer, (P, m) per image; -1 is the last. Raises UserError for other layers."""
    try:
        tower = _kind(name).load_patches(_place(name), _weights(name, weights), layer, dtype, random_weights)
    except (AssertionError, IndexError) as error:
        raise UserError(f"vision tower {name}: has no layer {layer}; -1 is its last") from error
    return _named(name, tower)


def plan_vision(name: str, dtype: str = "float32", layer: int | None = None) -> VisionTower:
    """The tower without weights, on the meta device, read at the patches of a layer unless that is None.

    Raises UserError for unknown names, and for configurations that are neither on disk nor on the hub.
    """
    with torch.device("meta"):
        if layer is None:
            return load_vision(name, None, dtype, random_weights=True)
        return load_patches(name, None, layer, dtype, random_weights=True)


def check_vision(name: str, weights: str | None = None) -> None:
    """Raise UserError for a name or weights that load_vision would refuse; nothing is loaded."""
    _kind(name).check(_place(name), _weights(name, weights))


def _place(name: str) -> str:
    """What the kind of a tower loads: the folder of one that fromage.models.towers fetches, else the name as it is."""
    return f"timm:local-dir:{towers.folder_of(name)}" if towers.is_own(name) else name


def _named(name: str, tower: VisionTower) -> VisionTower:
    """The tower with the name that was asked for, which is the same on every machine."""
    tower.name = tower.name.replace(_place(name), name)
    return tower


def _kind(name: str) -> type[VisionTower]:
    return TimmTower if towers.is_own(name) else KINDS.get(name.partition(":")[0], OpenClipTower)


def _weights(name: str, weights: str | None) -> str | None:
    """The weights, but for a tag of open_clip (the default of configurations is openai), which other kinds do not have."""
    tag = weights and not Path(weights).exists() and weights in {tag for _, tag in open_clip.list_pretrained()}
    return None if tag and _kind(name) is not OpenClipTower else weights
