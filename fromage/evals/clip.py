"""The baseline: the frozen CLIP whose image tower the model has, by its own two towers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fromage.backbones import load_clip, split_head
from fromage.errors import UserError
from fromage.model import Fromage


class Clip:
    """CLIP's text tower, and its projection of the features that the model's image tower gives."""

    def __init__(self, model: Fromage) -> None:
        """Load it as the model names it. Raises UserError as load_clip does, and for a model whose towers have no name."""
        if not (had := model.settings):
            raise UserError("the model's image tower has no name to load its CLIP by: build the model by Fromage.load")
        self.clip, _, self.tokenize = load_clip(
            *(had[name] for name in ("vision", "vision_weights", "dtype", "random_weights"))
        )
        self.project = projection(self.clip.visual).to(model.device)
        del self.clip.visual  # the model has it
        self.clip.to(model.device)

    @torch.no_grad()
    def embed_features(self, features: Tensor) -> Tensor:
        """(N, m) image features -> (N, e) unit rows."""
        return F.normalize(self.project(features.float()), dim=-1)

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, e) unit rows; what is beyond CLIP's 77 tokens is cut off, as in the paper."""
        ids = self.tokenize(list(texts)).to(self.clip.logit_scale.device)  # (N, 77)
        return F.normalize(self.clip.encode_text(ids).float(), dim=-1)


def projection(visual: Any) -> nn.Module:
    """m -> e: what an open_clip image tower has behind its pooled features, which fromage.backbones takes off."""
    if getattr(visual, "proj", None) is not None:  # a ViT
        behind: Any = nn.Linear(visual.proj.shape[0], visual.proj.shape[1], bias=False)
        behind.weight = nn.Parameter(visual.proj.detach().T)  # (m, e) -> (e, m)
    elif hasattr(visual, "attnpool"):  # a ResNet
        behind = visual.attnpool.c_proj
    else:
        behind = split_head(visual)[1] if hasattr(visual, "trunk") else None
    if behind is None:
        raise UserError(f"CLIP's {type(visual).__name__} has no projection behind its pooling; leave it out by --no-clip")
    return behind.float().requires_grad_(False)
