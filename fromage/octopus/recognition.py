"""Parallel recognition: a DETR decoder in the middle of the language model turns object queries into boxes and scores.

Boxes are (centre x, centre y, width, height), relative to the image. The legend of shapes is in fromage.models.

The paper (Octopus, section 3.2): queries pass the bottom layers of the language model, then a DETR decoder that gives boxes,
and its outputs continue through the top layers. How they return to width d, and the sizes, are ours; so are the three
classes, where the paper has one binary score. DETR: Carion et al., ECCV 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import MLP, box_convert

MEANT, OTHER, NOTHING = 0, 1, 2  # classes of a query: an object that the prompt means, another object, no object


@dataclass(frozen=True)
class Detections:
    """The output of the decoder.

    Attributes:
        logits: (L, B, N, 3) of MEANT, OTHER and NOTHING, per layer; the last layer gives the result.
        boxes: (L, B, N, 4), per layer.
        relay: (B, N, d), the hidden states that replace the queries in the top layers.
    """

    logits: Tensor
    boxes: Tensor
    relay: Tensor

    @cached_property
    def log_scores(self) -> Tensor:
        """(B, N): log-probability that the prompt means a query's object."""
        return self.logits[-1].float().log_softmax(-1)[..., MEANT]

    @property
    def scores(self) -> Tensor:
        """(B, N): probability that the prompt means a query's object."""
        return self.log_scores.exp()

    @property
    def corners(self) -> Tensor:
        """(B, N, 4): left, top, right, bottom, clipped to the image."""
        return box_convert(self.boxes[-1], "cxcywh", "xyxy").clamp(0, 1)


class Recognizer(nn.Module):
    """The DETR decoder: queries attend to each other and to the patches; each layer predicts boxes.

    Each query has a learned reference point, and its box is predicted relative to it (as in Conditional DETR); without it,
    queries need hundreds of epochs to specialise on parts of the image. The logit of MEANT has, beside a linear term, a
    product of what the query saw (decoder state) and what was asked (its hidden state in the language model); the linear
    term alone learns this far later.
    """

    def __init__(
        self,
        d: int,
        m: int,
        grid: tuple[int, int],
        num_queries: int,
        decoder_width: int = 256,
        layers: int = 6,
        heads: int = 8,
    ) -> None:
        """grid: rows and columns of patches. num_queries: N. decoder_width: c. d, m: as in fromage.models."""
        super().__init__()
        c = decoder_width
        self.enter, self.look = nn.Linear(d, c), nn.Linear(m, c)
        self.points = nn.Parameter(_spread(num_queries))  # (N, 2), before the sigmoid
        self.layers = nn.ModuleList(DecoderLayer(c, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(c)
        self.classify = nn.Linear(c, 3)
        self.asked = nn.Linear(d, c)
        self.box = MLP(c, [c, c, 4])
        self.leave = nn.Linear(2 * c, d)
        self.grid = grid
        self.register_buffer("places", waves(_centres(grid), c), persistent=False)  # (P, c)

    def forward(self, hidden: Tensor, patches: Tensor) -> Detections:
        """hidden (B, N, d) of the queries after the bottom layers, patches (B, P, m) -> what they found."""
        c = self.enter.out_features
        x = self.enter(hidden.float()) + waves(self.points.sigmoid(), c)  # (B, N, c)
        asked = self.asked(hidden.float()) / c**0.5  # (B, N, c)
        memory = self.look(patches.float()) + self.places  # (B, P, c)
        states = []
        for layer in self.layers:
            x = layer(x, memory)  # (B, N, c)
            states.append(x)
        read = self.norm(torch.stack(states))  # (L, B, N, c)
        boxes = self._boxes(read)  # (L, B, N, 4)
        alike = (read * asked).sum(-1, keepdim=True)  # x (W_a h) / sqrt(c): (L, B, N, 1)
        logits = self.classify(read) + F.pad(alike, (MEANT, 2 - MEANT))  # (L, B, N, 3)
        thing = torch.cat([read[-1], _embedded(boxes[-1].detach(), c)], -1)  # (B, N, 2c)
        return Detections(logits, boxes, self.leave(thing))  # (B, N, d)

    def _boxes(self, read: Tensor) -> Tensor:
        """(L, B, N, c) -> (L, B, N, 4): centres from the queries' points, sizes free."""
        moved = self.box(read)  # (L, B, N, 4)
        return torch.cat([moved[..., :2] + self.points, moved[..., 2:]], -1).sigmoid()


class DecoderLayer(nn.TransformerDecoderLayer):
    """PyTorch's with norms in front and GELU, without masks and dropout: the same sums in fewer steps of Python."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__(c, heads, 4 * c, 0.0, "gelu", batch_first=True, norm_first=True)

    def forward(self, tgt: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        """Queries (B, N, c) and patches (B, P, c) -> (B, N, c)."""
        x = self.norm1(tgt)
        x = tgt + _attended(self.self_attn, x, x)
        x = x + _attended(self.multihead_attn, self.norm2(x), memory)
        return x + self.linear2(F.gelu(self.linear1(self.norm3(x))))


def _attended(attention: nn.MultiheadAttention, x: Tensor, memory: Tensor) -> Tensor:
    """(B, N, c), (B, P, c) -> (B, N, c): what x finds in the memory. H heads of h values."""
    c, split = attention.embed_dim, (attention.num_heads, attention.head_dim)
    weight, bias = attention.in_proj_weight, attention.in_proj_bias  # (3c, c), (3c,): of queries, keys and values
    q = F.linear(x, weight[:c], bias[:c]).unflatten(-1, split).transpose(1, 2)  # (B, H, N, h)
    k, v = F.linear(memory, weight[c:], bias[c:]).unflatten(-1, (2, *split)).permute(2, 0, 3, 1, 4)  # (B, H, P, h) each
    seen = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, h)
    return attention.out_proj(seen.transpose(1, 2).flatten(2))  # (B, H, N, h) -> (B, N, c)


def _spread(n: int) -> Tensor:
    """(N, 2): points spread evenly over the image (Fibonacci's lattice), before the sigmoid."""
    i = torch.arange(n) + 0.5
    points = torch.stack([i * (math.sqrt(5) - 1) / 2 % 1, i / n], -1)
    return torch.logit(points * 0.9 + 0.05)


def _centres(grid: tuple[int, int]) -> Tensor:
    """(P, 2): x and y of the patches' centres, row by row."""
    y, x = torch.meshgrid(*((torch.arange(size) + 0.5) / size for size in grid), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], -1)


def waves(points: Tensor, c: int) -> Tensor:
    """(..., 2) numbers from 0 to 1 -> (..., c): sines and cosines of half a wave to six octaves more, c / 2 for each."""
    octaves = torch.logspace(0, 6, c // 4, base=2, device=points.device)  # (c / 4,)
    phase = math.pi * points.unsqueeze(-1) * octaves  # (..., 2, c / 4)
    return torch.cat([phase.sin(), phase.cos()], -1).flatten(-2)  # (..., c)


def _embedded(boxes: Tensor, c: int) -> Tensor:
    """(..., 4) boxes -> (..., c): waves of centre and size, c / 2 each."""
    return waves(boxes.unflatten(-1, (2, 2)), c // 2).flatten(-2)  # (..., 2, 2) -> (..., 2, c / 2) -> (..., c)
