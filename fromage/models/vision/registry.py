"""The registry of vision towers: a prefix such as timm: names the kind; names without a known prefix are open_clip's."""

from __future__ import annotations

from fromage.errors import UserError
from fromage.models.vision.base import VisionTower
from fromage.models.vision.open_clip import OpenClipTower
from fromage.models.vision.timm import TimmTower

KINDS: dict[str, type[VisionTower]] = {"timm": TimmTower}


def load_vision(name: str, weights: str | None = None, dtype: str = "float32", random_weights: bool = False) -> VisionTower:
    """Load and freeze a vision tower by its name in a configuration.

    weights: a tag or file, where the name does not include them; random_weights builds the architecture alone. Raises
    UserError for unknown names, and for weights that are neither on disk nor on the hub.
    """
    return _kind(name).load(name, weights, dtype, random_weights)


def load_patches(
    name: str, weights: str | None = None, layer: int = -2, dtype: str = "float32", random_weights: bool = False
) -> VisionTower:
    """The same tower read at the patches of a layer, (P, m) per image; -1 is the last. Raises UserError for other layers."""
    return _kind(name).load_patches(name, weights, layer, dtype, random_weights)


def check_vision(name: str, weights: str | None = None) -> None:
    """Raise UserError for a name or weights that load_vision would refuse; nothing is loaded."""
    _kind(name).check(name, weights)


def check_text_tower(name: str) -> None:
    """Raise UserError for a vision tower that comes without a text tower; nothing is loaded."""
    if not _kind(name).has_text:
        raise UserError(f"the vision tower {name} has no text tower, so no CLIP baseline; leave it out: --no-clip")


def _kind(name: str) -> type[VisionTower]:
    return KINDS.get(name.partition(":")[0], OpenClipTower)
