"""The visual prefix, as FROMAGe and Octopus share it: a language model whose prompt contains images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fromage.checkpoints.format import TOWERS
from fromage.data.tokenizer import PromptTokenizer
from fromage.models.language_model import LanguageModel
from fromage.models.vision.base import VisionTower


class VisualPrefix(nn.Linear):
    """W_c: features of an image become input embeddings, W_c v(x) + b, in float32.

    FROMAGe (section 3.1) makes k of an image's one feature; Octopus (section 4.1) one of each of its P patches.
    """

    def __init__(self, m: int, d: int, k: int = 1) -> None:
        """m: width of a feature. d: width of an embedding. k: embeddings of a feature."""
        super().__init__(m, k * d)
        self.d = d

    def forward(self, features: Tensor) -> Tensor:
        """(B, m) -> (B, k, d); (B, P, m) -> (B, P k, d)."""
        return super().forward(features.float()).unflatten(-1, (-1, self.d)).flatten(1, -2)


class VisualPrefixLM(nn.Module):
    """A language model and a vision tower, joined by a visual prefix: each image becomes k input embeddings.

    A subclass makes the visual prefix.
    """

    visual_prefix: VisualPrefix
    start_first = False  # whether a prompt has one start token, in front of all, images included

    def __init__(self, lm: LanguageModel, vision: VisionTower, k: int) -> None:
        super().__init__()
        self.lm, self.vision, self.k = lm, vision, k
        self.tokenizer: PromptTokenizer = lm.tokenizer

    @property
    def device(self) -> torch.device:
        """The device of the trained parameters."""
        return self.visual_prefix.weight.device

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters outside the two towers, by name."""
        return {name: p for name, p in self.named_parameters() if not name.startswith(TOWERS)}

    def fingerprint(self, trained: Mapping[str, Tensor] | None = None) -> str:
        """16 hex digits that change with any parameter; they name the model in reports and indexes.

        trained: values to use in place of the model's own, such as the values after rounding to a file's dtype.
        """
        raise NotImplementedError

    def embed(self, ids: Tensor, prefix: Tensor | None = None) -> Tensor:
        """(B, T) ids -> (B, T, d) input embeddings; <|image|> tokens take the rows of prefix (N, k, d), in order."""
        embeds = self.lm.embed(ids)  # (B, T, d)
        return embeds if prefix is None else fill(embeds, ids == self.tokenizer.image_id, prefix)  # (B, T, d)


def digest(built: str, trained: Mapping[str, Tensor]) -> str:
    """16 hex digits of a description of the architecture and of the trained parameters."""
    summed = hashlib.sha256(built.encode())
    for name, p in sorted(trained.items()):
        summed.update(name.encode() + p.detach().float().cpu().numpy().tobytes())
    return summed.hexdigest()[:16]


def fill(embeds: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """(B, T, d) in which the places (B, T) bool are replaced, in order, by rows (..., d).

    The backward of masked_scatter would wait for the device.
    """
    if not rows.numel():
        return embeds + rows.sum()  # a zero gradient, since DDP waits for one
    number = (places.flatten().cumsum(0) - 1).clamp(min=0)  # (B T,): of the row at a place, or before it
    there = rows.to(embeds.dtype).flatten(0, -2).index_select(0, number)  # (B T, d)
    return torch.where(places.unsqueeze(-1), there.view_as(embeds), embeds)  # (B, T, d)
