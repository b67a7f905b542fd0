"""Pointing: which recognised object suits what an answer asks for next.

Shapes: B batch, T tokens of a prompt, A of an answer, N object queries, P patches, m width of the patch features, d width of
the language model, c width of the decoder.

    alignment  S_ti = (W_v w_t) (W_s r_i) / sqrt(c)             how well word t suits object i            (B, T, N)
    attention  a_t  = softmax_t (W_q h) (W_k w_t) / sqrt(c)     which words an answer's state h is after  (B, A, T)
    suits      a S                                                                                        (B, A, N)

w_t: word t between the halves of the language model; r_i: the mean of the patches in box i. Words and regions are aligned as
in detectors by words (GLIP: Li et al., CVPR 2022); the answer chooses which words count. That the top layers do this, and
not the recognizer, is ours (docs/octopus.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, roi_align


@dataclass(frozen=True)
class Aligned:
    """The words of a batch of prompts, held against what was recognised.

    Attributes:
        words: (B, T, c), W_k w / sqrt(c), by which they are looked up.
        alignment: (B, T, N), how well each suits each object.
        text: (B, T) bool, the tokens that are words.
    """

    words: Tensor
    alignment: Tensor
    text: Tensor


class Pointer(nn.Module):
    """Holds words against the patches in each box, and looks up those words that an answer is after."""

    def __init__(self, d: int, m: int, grid: tuple[int, int], c: int) -> None:
        """grid: rows and columns of patches. The rest in the letters above."""
        super().__init__()
        self.ask, self.find, self.tell = nn.Linear(d, c), nn.Linear(d, c), nn.Linear(d, c)  # W_q, W_k, W_v
        self.see = nn.Linear(m, c)  # W_s
        self.grid, self.scale = grid, c**-0.5

    def align(self, hidden: Tensor, text: Tensor, patches: Tensor, boxes: Tensor) -> Aligned:
        """Hold words against regions, once per prompt.

        hidden (B, T, d) of the prompts between the halves, text (B, T) bool of the tokens that are words, patches (B, P, m),
        boxes (B, N, 4), through which no gradient goes.
        """
        words, under = hidden.float(), regions(patches.float(), self.grid, boxes.detach())  # (B, T, d), (B, N, m)
        alignment = self.tell(words) @ self.see(under).mT * self.scale  # (B, T, N)
        return Aligned(self.find(words) * self.scale, alignment, text)

    def forward(self, hidden: Tensor, aligned: Aligned) -> Tensor:
        """(B, A, d) hidden states of an answer -> (B, A, N): how well each object suits them."""
        scores = self.ask(hidden.float()) @ aligned.words.mT  # (B, A, T)
        after = scores.masked_fill(~aligned.text.unsqueeze(1), -torch.inf).softmax(-1)
        return after @ aligned.alignment


def regions(patches: Tensor, grid: tuple[int, int], boxes: Tensor) -> Tensor:
    """(B, P, m) patches and (B, N, 4) boxes -> (B, N, m): the mean of the patches under each box (RoIAlign, one bin)."""
    rows, columns = grid
    corners = box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([columns, rows, columns, rows])  # (B, N, 4)
    maps = patches.mT.unflatten(-1, grid)  # (B, m, rows, columns)
    means = roi_align(maps, list(corners), 1, sampling_ratio=2, aligned=True)  # (B N, m, 1, 1)
    return means.view(*boxes.shape[:2], -1)
