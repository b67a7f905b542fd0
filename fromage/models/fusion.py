"""Fusion: one text embedding from the hidden states at r [RET] tokens, each mapped by W_t to the retrieval space.

transformer is MCL's (Li et al., "Improving Context Understanding in Multimodal Large Language Models via Multimodal
Composition Learning", ICML 2024), whose released code has two such layers. They stand after W_t there too, where they are
small: a layer has 8 q^2 weights, 0.5 million at q = 256, and would have 134 million at the width of OPT-6.7B. mean leaves
the layer out. first is GILL's released retrieval head (Koh et al., "Generating Images with Multimodal Language Models",
NeurIPS 2023): it maps all r states and keeps the first. With r = 1, mean and first are the paper's FROMAGe.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from fromage.config import RetFusion


class Mean(nn.Module):
    """The mean of the r rows."""

    def forward(self, rows: Tensor) -> Tensor:
        """(B, r, q) -> (B, q)."""
        return rows.mean(1)


class First(nn.Module):
    """The first of the r rows."""

    def forward(self, rows: Tensor) -> Tensor:
        """(B, r, q) -> (B, q)."""
        return rows[:, 0]


class Transformer(nn.Module):
    """The mean of the r rows after one transformer layer among them: pre-norm, inner width 2 q, without dropout."""

    def __init__(self, q: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(q, math.gcd(q, 4), 2 * q, 0.0, batch_first=True, norm_first=True)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, r, q) -> (B, q)."""
        return self.layer(rows).mean(1)


def make_fusion(kind: RetFusion, q: int) -> nn.Module:
    """(B, r, q) -> (B, q), by its name."""
    return Transformer(q) if kind == "transformer" else {"mean": Mean, "first": First}[kind]()
