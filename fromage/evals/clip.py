"""The baseline of retrieval: the frozen CLIP whose image tower the model has, by CLIP's own two towers."""

from __future__ import annotations

from fromage.models.base import VisualPrefixLM
from fromage.models.vision.base import TextTower


def load_clip_baseline(model: VisualPrefixLM) -> TextTower | None:
    """The text tower beside the model's vision tower, or None for a vision tower without one (see `no_baseline`)."""
    return model.vision.text_tower()


def no_baseline(model: VisualPrefixLM) -> str:
    """What a table says in place of the baseline of a vision tower without text tower."""
    return f"{model.vision.name} has no text tower: no CLIP baseline"
