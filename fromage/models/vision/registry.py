"""The registry of vision towers: a prefix such as timm: names the kind; names without a known prefix are open_clip's."""

from __future__ import annotations

from fromage.errors import UserError
from fromage.models import towers
from fromage.models.vision.base import VisionTower
from fromage.models.vision.open_clip import OpenClipTower
from fromage.models.vision.timm import TimmTower

KINDS: dict[str, type[VisionTower]] = {"timm": TimmTower}


def load_vision(name: str, weights: str | None = None, dtype: str = "float32", random_weights: bool = False) -> VisionTower:
    """Load and freeze a vision tower by its name in a configuration.

    weights: a tag or file, where the name does not include them; random_weights builds the architecture alone. Raises
    UserError for unknown names, and for weights that are neither on disk nor on the hub.
    """
    tower = _kind(placed := _placed(name)).load(placed, None if placed != name else weights, dtype, random_weights)
    tower.name = name if placed != name else tower.name
    return tower


def load_patches(
    name: str, weights: str | None = None, layer: int = -2, dtype: str = "float32", random_weights: bool = False
) -> VisionTower:
    """The same tower read at the patches of a layer, (P, m) per image; -1 is the last. Raises UserError for other layers."""
    tower = _kind(placed := _placed(name)).load_patches(
        placed, None if placed != name else weights, layer, dtype, random_weights
    )
    tower.name = f"{name}, patches of {layer}" if placed != name else tower.name
    return tower


def check_vision(name: str, weights: str | None = None) -> None:
    """Raise UserError for a name or weights that load_vision would refuse; nothing is loaded."""
    _kind(placed := _placed(name)).check(placed, None if placed != name else weights)


def check_text_tower(name: str) -> None:
    """Raise UserError for a vision tower that comes without a text tower; nothing is loaded."""
    if not _kind(_placed(name)).has_text:
        raise UserError(f"the vision tower {name} has no text tower, so no CLIP baseline; leave it out: --no-clip")


def _placed(name: str) -> str:
    """A tower of this package's own cache by its folder; another name as it is."""
    return f"timm:local-dir:{towers.folder_of(name)}" if towers.is_own(name) else name


def _kind(name: str) -> type[VisionTower]:
    return KINDS.get(name.partition(":")[0], OpenClipTower)
