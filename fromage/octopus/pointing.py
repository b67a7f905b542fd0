"""Pointing: which recognised object suits what an answer asks for next.

Shapes: B batch, T tokens of a prompt, A of an answer, N object queries, P patches, m width of the patch features, d width of
the language model, c width of the decoder. Biases are left out:

    alignment  S_ti = (W_v w_t) (W_r r_i)                       how well word t suits object i            (B, T, N)
    attention  a_t  = softmax_t (W_q h) (W_k w_t) / sqrt(c)     which words an answer's state h is after  (B, A, T)
    suits      a S                                                                                        (B, A, N)

w_t: word t of the prompt between the halves of the language model, normalised; the softmax runs over words alone. r_i: the
mean of the patches in box i. Words and regions are aligned as in detectors by words (GLIP: Li et al., CVPR 2022); the answer
chooses which words count. That the top layers do this, and not the recognizer, is ours (docs/octopus.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert


@dataclass(frozen=True)
class Aligned:
    """The words of a batch of prompts, held against what was recognised.

    Attributes:
        keys: (B, T, c), W_k w / sqrt(c), by which words are looked up.
        alignment: (B, T, N), how well each word suits each object.
        mask: (B, T) bool, the tokens that are words.
    """

    keys: Tensor
    alignment: Tensor
    mask: Tensor


class Pointer(nn.Module):
    """Holds words against the patches in each box, and looks up those words that an answer is after."""

    def __init__(self, d: int, m: int, grid: tuple[int, int], c: int) -> None:
        """grid: rows and columns of patches. The rest in the letters above."""
        super().__init__()
        self.norm = nn.LayerNorm(d)  # hidden states halfway up a language model have a few huge dimensions
        self.query, self.key, self.value = nn.Linear(d, c), nn.Linear(d, c, bias=False), nn.Linear(d, c)
        self.region = nn.Linear(m, c)  # W_r
        self.grid, self.scale = grid, c**-0.5

    def align(self, hidden: Tensor, mask: Tensor, patches: Tensor, boxes: Tensor) -> Aligned:
        """Hold words against regions, once per prompt.

        hidden (B, T, d) of the prompts between the halves, mask (B, T) bool of the tokens that are words, patches (B, P, m),
        boxes (B, N, 4), through which no gradient goes.
        """
        words = self.norm(hidden.float())  # (B, T, d)
        region = self.region(regions(patches.float(), self.grid, boxes.detach().float()))  # (B, N, m) -> (B, N, c)
        return Aligned(self.key(words) * self.scale, self.value(words) @ region.mT, mask)

    def forward(self, hidden: Tensor, aligned: Aligned) -> Tensor:
        """(B, A, d) hidden states of an answer -> (B, A, N): how well each object suits them."""
        scores = self.query(hidden.float()) @ aligned.keys.mT  # (B, A, T)
        weights = scores.masked_fill(~aligned.mask.unsqueeze(1), torch.finfo(scores.dtype).min).softmax(-1)
        return weights @ aligned.alignment


def regions(patches: Tensor, grid: tuple[int, int], boxes: Tensor) -> Tensor:
    """(B, P, m) patches and (B, N, 4) boxes -> (B, N, m): the mean of the patches in each box, by the area they share.

    What of a box is outside the image does not count; a box without area has zeros.
    """
    left, top, right, bottom = box_convert(boxes, "cxcywh", "xyxy").unbind(-1)  # (B, N) each
    down, across = _covered(top, bottom, grid[0]), _covered(left, right, grid[1])
    areas = (down.unsqueeze(-1) * across.unsqueeze(-2)).flatten(2)  # (B, N, rows, columns) -> (B, N, P)
    return areas @ patches / areas.sum(-1, keepdim=True).clamp(min=torch.finfo(areas.dtype).tiny)


def _covered(low: Tensor, high: Tensor, n: int) -> Tensor:
    """(B, N) ends of stretches -> (B, N, n): how much of each n-th of the image they cover, in n-ths."""
    edge = torch.arange(n, device=low.device)
    return (torch.minimum(n * high.unsqueeze(-1), edge + 1) - torch.maximum(n * low.unsqueeze(-1), edge)).clamp(min=0)
