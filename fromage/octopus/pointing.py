"""Pointing: which detected object suits the words that an answer attends to; a term of the logits of index tokens.

In formulas (biases left out; the legend of shapes is in fromage.models):

    alignment  S_ti = (W_v w_t) (W_r r_i)                       how well word t suits object i            (B, T, N)
    attention  a_t  = softmax_t (W_q h) (W_k w_t) / sqrt(c)     which words a hidden state h attends to   (B, A, T)
    logit      a S                              how well each object suits h                              (B, A, N)

w_t: hidden state of word t of the prompt between the halves of the language model, normalised; the softmax runs over words
only. r_i: mean of the patches in box i. Words and regions are aligned as in GLIP (Li et al., CVPR 2022); the answer chooses
which words count. The paper has no such term; it is ours (docs/octopus.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert


@dataclass(frozen=True)
class Aligned:
    """The words of a batch of prompts, and how well they suit the detected objects.

    Attributes:
        keys: (B, T, c), W_k w / sqrt(c), the keys of the attention over words.
        alignment: (B, T, N), how well each word suits each object.
        mask: (B, T) bool, the tokens that are words.
    """

    keys: Tensor
    alignment: Tensor
    mask: Tensor


class Pointer(nn.Module):
    """Aligns words with the patches in each box, and attends from an answer to the words."""

    def __init__(self, d: int, m: int, grid: tuple[int, int], c: int) -> None:
        """grid: rows and columns of patches. d, m, c: as in fromage.models."""
        super().__init__()
        self.norm = nn.LayerNorm(d)  # hidden states halfway up a language model have a few huge dimensions
        self.query, self.key, self.value = nn.Linear(d, c), nn.Linear(d, c, bias=False), nn.Linear(d, c)
        self.region = nn.Linear(m, c)  # W_r: (B, N, m) -> (B, N, c)
        self.grid, self.scale = grid, c**-0.5

    def align(self, hidden: Tensor, mask: Tensor, patches: Tensor, boxes: Tensor) -> Aligned:
        """Align words and regions, once per prompt.

        hidden (B, T, d) between the halves of the language model; mask (B, T) bool, True for words; patches (B, P, m);
        boxes (B, N, 4), which get no gradient from this.
        """
        words = self.norm(hidden.float())  # (B, T, d)
        region = self.region(regions(patches.float(), self.grid, boxes.detach().float()))  # (B, N, m) -> (B, N, c)
        return Aligned(self.key(words) * self.scale, self.value(words) @ region.mT, mask)  # (B, T, c), (B, T, N)

    def forward(self, hidden: Tensor, aligned: Aligned) -> Tensor:
        """(B, A, d) hidden states of an answer -> (B, A, N): how well each object suits them."""
        scores = self.query(hidden.float()) @ aligned.keys.mT  # (B, A, T)
        weights = scores.masked_fill(~aligned.mask.unsqueeze(1), torch.finfo(scores.dtype).min).softmax(-1)
        return weights @ aligned.alignment  # (B, A, T) (B, T, N) -> (B, A, N)


def regions(patches: Tensor, grid: tuple[int, int], boxes: Tensor) -> Tensor:
    """(B, P, m) patches and (B, N, 4) boxes -> (B, N, m): the mean of the patches in each box, weighted by the shared area.

    The part of a box outside the image does not count; a box without area gives zeros.
    """
    left, top, right, bottom = box_convert(boxes, "cxcywh", "xyxy").unbind(-1)  # (B, N) each
    down, across = _covered(top, bottom, grid[0]), _covered(left, right, grid[1])
    areas = (down.unsqueeze(-1) * across.unsqueeze(-2)).flatten(2)  # (B, N, rows, columns) -> (B, N, P)
    return areas @ patches / areas.sum(-1, keepdim=True).clamp(min=torch.finfo(areas.dtype).tiny)


def _covered(low: Tensor, high: Tensor, n: int) -> Tensor:
    """(B, N) ends of intervals in 0 to 1 -> (B, N, n): the part (0 to 1) of each of n equal cells that they cover."""
    edge = torch.arange(n, device=low.device)  # (n,)
    return (torch.minimum(n * high.unsqueeze(-1), edge + 1) - torch.maximum(n * low.unsqueeze(-1), edge)).clamp(min=0)
