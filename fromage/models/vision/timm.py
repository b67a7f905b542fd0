"""Vision towers of timm: any of its image models, pooled or at their patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from fromage.checkpoints.format import DTYPES
from fromage.checkpoints.hub import stay_offline_without_hub
from fromage.checkpoints.weights import read_weights
from fromage.errors import UserError, first_line
from fromage.images.transforms import scaling
from fromage.models.vision.base import VisionTower

LOCAL, HUB = "local-dir:", "hf-hub:"


class TimmTower(VisionTower):
    """A frozen image model of timm, pooled before its classifier: v(x) in R^m. It has no text tower.

    Names: 'timm:NAME' (weights from the hub), 'timm:hf-hub:ORG/NAME', 'timm:local-dir:FOLDER' (a config.json and weights, as
    timm's save_for_hf writes them), and any of these with '@FILE' after it for weights in a torch or safetensors file.
    """

    @classmethod
    def load(cls, name: str, weights: str | None, dtype: str, random_weights: bool) -> TimmTower:
        """weights: a file, instead of @FILE."""
        visual, config = _create(name, weights, random_weights)
        transform = create_transform(**config, is_training=False)
        return cls(visual.to(DTYPES[dtype]), transform, name, config["input_size"][1:])

    @classmethod
    def check(cls, name: str, weights: str | None) -> None:
        """See _parts."""
        _parts(name, weights)

    @classmethod
    def load_patches(cls, name: str, weights: str | None, layer: int, dtype: str, random_weights: bool) -> VisionTower:
        """See TimmPatches."""
        visual, config = _create(name, weights, random_weights)
        if not hasattr(visual, "forward_intermediates"):
            return super().load_patches(name, weights, layer, dtype, random_weights)
        return TimmPatches(visual.to(DTYPES[dtype]), config, name, layer)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, m)."""
        return self.visual(pixels)


class TimmPatches(TimmTower):
    """A frozen image model of timm read at its patches, or a convolutional one at a feature map: (P, m) per image."""

    def __init__(self, visual: nn.Module, config: dict[str, Any], name: str, layer: int) -> None:
        """layer: which block of a ViT, or stage of a convolutional model, is read; -1 is the last."""
        self.layer = layer
        size = config["input_size"][1:]
        transform = scaling(size, None, config["interpolation"], config["mean"], config["std"])
        super().__init__(visual, transform, f"{name}, patches of {layer}", size)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, m, rows, columns)."""
        layers = {"indices": [self.layer], "stop_early": True, "intermediates_only": True}
        return self.visual.forward_intermediates(pixels, **layers)[0]


def _create(name: str, weights: str | None, random_weights: bool) -> tuple[Any, dict[str, Any]]:
    """A model without its classifier, and its preprocessing. Raises UserError for weights that are missing or another's."""
    model, file = _parts(name, None if random_weights else weights)
    state = read_weights(file) if file and not random_weights else None
    visual: Any
    try:
        if state is not None:
            given = _as_source(model, state)
            visual = timm.create_model(model, num_classes=0, pretrained=True, pretrained_cfg_overlay=given)
            visual.pretrained_cfg.pop("state_dict")  # else the weights would stay in memory twice
        elif random_weights:
            visual = timm.create_model(model, num_classes=0)
        else:
            if not model.startswith(LOCAL):
                stay_offline_without_hub()
            # timm compares all names with the model's own number of classes only
            visual = timm.create_model(model, pretrained=True)
            visual.reset_classifier(0)
    except Exception as error:
        if file or model.startswith(LOCAL):
            found = file or "its weights"
            told = f"{found}: of another model, missing or damaged ({first_line(error).rstrip(':')})"
            raise UserError(f"vision tower {name}: {told}; give its own as timm:NAME@FILE") from error
        raise UserError(f"vision tower {name}: not loaded ({first_line(error)}); give weights as timm:NAME@FILE") from error
    return visual.eval(), resolve_model_data_config(visual)


def _as_source(model: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """Entries of timm's pretrained_cfg that make it load these tensors, less the classifier, and miss none."""
    with torch.device("meta"):
        empty: Any = timm.create_model(model, num_classes=0)
    named = empty.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([named] if isinstance(named, str) else named))
    kept = {key: value for key, value in state.items() if not key.startswith(heads)} if heads else state
    return {"state_dict": kept, "source": "", "num_classes": 0, "custom_load": False}


def _parts(name: str, weights: str | None) -> tuple[str, str]:
    """'timm:NAME@FILE' -> what timm calls the model, and the file of weights or ''; folders may have an @ in their names.

    Raises UserError for a name that timm does not know, and for a folder or file that is not there.
    """
    model, file = name.removeprefix("timm:"), weights or ""
    cuts = [i for i, sign in enumerate(model) if sign == "@"]
    if model.startswith(LOCAL):
        ends = [i for i in (len(model), *reversed(cuts)) if (Path(model[len(LOCAL) : i]) / "config.json").is_file()]
        if not ends:
            raise UserError(f"vision tower {name}: no folder with a config.json of timm; give timm:local-dir:FOLDER")
        model, at = model[: ends[0]], model[ends[0] + 1 :]
    elif model.startswith(HUB):  # ORG/NAME@REVISION is the hub's own
        cut = next((i for i in cuts if Path(model[i + 1 :]).is_file()), len(model))
        model, at = model[:cut], model[cut + 1 :]
    else:
        model, _, at = model.partition("@")
        if not timm.is_model(model):
            raise UserError(f"vision tower {name}: unknown to timm; timm.list_models() names {len(timm.list_models())}")
    file = at or file
    if file and not Path(file).is_file():
        raise UserError(f"vision tower {name}: no weights at {file}; give a torch or safetensors file")
    return model, file
