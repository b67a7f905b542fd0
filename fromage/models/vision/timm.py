"""Vision towers of timm: any of its image models, as `timm:NAME`, or `timm:NAME@FILE` for weights on disk."""

from __future__ import annotations

import timm
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from fromage.checkpoints.format import DTYPES
from fromage.checkpoints.hub import look_for_hub
from fromage.errors import UserError, first_line
from fromage.models.vision.base import VisionTower


class TimmTower(VisionTower):
    """A frozen image model of timm, pooled before its classifier: v(x) in R^m. It has no text tower."""

    @classmethod
    def load(cls, name: str, weights: str | None, dtype: str, random_weights: bool) -> TimmTower:
        """name: 'timm:NAME' (weights from the hub), or 'timm:NAME@FILE'; weights: a file, instead of @FILE."""
        model, _, file = name.removeprefix("timm:").partition("@")
        file = file or weights or ""
        try:
            if not (file or random_weights):
                look_for_hub()
            visual = timm.create_model(model, pretrained=not (file or random_weights), checkpoint_path=file, num_classes=0)
        except Exception as error:
            raise UserError(
                f"vision tower {name}: not loaded ({first_line(error)}); give weights as timm:NAME@FILE"
            ) from error
        config = resolve_model_data_config(visual)
        transform = create_transform(**config, is_training=False)
        return cls(visual.to(DTYPES[dtype]), transform, name, config["input_size"][1:])

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, m)."""
        return self.visual(pixels)
