"""What FROMAGe and Octopus have in common: a language model whose prompt holds images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fromage.checkpoints.format import TOWERS
from fromage.data.tokenizer import PromptTokenizer
from fromage.models.language_model import LanguageModel
from fromage.models.vision.base import VisionTower


class VisualPrefixLM(nn.Module):
    """A language model and an image tower, joined by a visual prefix: the k input embeddings that an image becomes.

    Letters as in fromage.models.fromage. A subclass says how many and by what map, in visual_prefix and prefix.
    """

    visual_prefix: nn.Linear

    def __init__(self, lm: LanguageModel, vision: VisionTower, k: int) -> None:
        super().__init__()
        self.lm, self.vision, self.k = lm, vision, k
        self.tokenizer: PromptTokenizer = lm.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the trained parameters are."""
        return self.visual_prefix.weight.device

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters beside the two towers, by name."""
        return {name: p for name, p in self.named_parameters() if not name.startswith(TOWERS)}

    def fingerprint(self) -> str:
        """16 hex digits that change with any parameter: what a report or an index belongs to."""
        raise NotImplementedError

    def prefix(self, features: Tensor) -> Tensor:
        """(B, *vision.shape) features of images -> (B, k, d) input embeddings."""
        raise NotImplementedError

    def embed(self, ids: Tensor, prefix: Tensor | None = None) -> Tensor:
        """(B, T) ids -> (B, T, d) input embeddings; the places of <|image|> are filled from prefix (N, k, d), in order."""
        embeds = self.lm.embed(ids)  # (B, T, d)
        return embeds if prefix is None else fill(embeds, ids == self.tokenizer.image_id, prefix)


def digest(built: str, trained: Mapping[str, Tensor]) -> str:
    """16 hex digits of what a model is built of, in words, and of its trained parameters."""
    summed = hashlib.sha256(built.encode())
    for name, p in sorted(trained.items()):
        summed.update(name.encode() + p.detach().float().cpu().numpy().tobytes())
    return summed.hexdigest()[:16]


def fill(embeds: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """(B, T, d) with the places (B, T) bool taken, in order, by rows (..., d)."""
    return embeds.masked_scatter(places.unsqueeze(-1), rows.to(embeds.dtype))
