"""The baseline of retrieval: the frozen CLIP whose image tower the model has, by CLIP's own two towers."""

from __future__ import annotations

from fromage.errors import UserError
from fromage.models.base import VisualPrefixLM
from fromage.models.vision.base import TextTower


def load_clip_baseline(model: VisualPrefixLM) -> TextTower:
    """The text tower beside the model's vision tower. Raises UserError for a vision tower without one."""
    tower = model.vision.text_tower()
    if tower is None:
        raise UserError(
            f"the vision tower {model.vision.name} has no text tower, so no CLIP baseline; leave it out: --no-clip"
        )
    return tower
