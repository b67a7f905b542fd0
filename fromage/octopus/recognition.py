"""Parallel recognition: a DETR decoder in the middle of the language model turns object queries into boxes and scores.

Boxes are (centre x, centre y, width, height), relative to the image. The legend of shapes is in fromage.models.

The paper (Octopus, sections 3.1 and 3.2): queries pass the bottom layers of the language model, then a DETR decoder over
the image's patches; a head gives each a box and one binary score, foreground or background; the decoder's outputs go on
through the top layers. How they return to width d, and the decoder's width, are ours. DETR: Carion et al., ECCV 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import MLP, box_convert

from fromage.octopus.masks import MaskHead


@dataclass(frozen=True)
class Detections:
    """The output of the decoder.

    Attributes:
        logits: (L, E, N) of the binary score, per layer; the last layer gives the result. E prompts.
        boxes: (L, E, N, 4), per layer.
        relay: (E, N, d), the hidden states that replace the queries in the top layers.
        masks: (E, N, H, W) logits, of the last layer alone; None without a mask head.
    """

    logits: Tensor
    boxes: Tensor
    relay: Tensor
    masks: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """(E, N): probability that a query is foreground, an object that the prompt is about."""
        return self.logits[-1].float().sigmoid()

    @property
    def corners(self) -> Tensor:
        """(E, N, 4): left, top, right, bottom, clipped to the image."""
        return box_convert(self.boxes[-1], "cxcywh", "xyxy").clamp(0, 1)


class Recognizer(nn.Module):
    """The DETR decoder: queries attend to each other and to the patches; each layer predicts boxes and scores.

    Each query has a learned reference point, and its box is predicted relative to it (as in Conditional DETR); without it,
    queries need hundreds of epochs to specialise on parts of the image.
    """

    def __init__(
        self,
        d: int,
        m: int,
        grid: tuple[int, int],
        num_queries: int,
        decoder_width: int = 256,
        layers: int = 4,
        heads: int = 8,
        mask_scale: int = 0,
    ) -> None:
        """grid: rows and columns of patches. num_queries: N. decoder_width: c. d, m: as in fromage.models.

        mask_scale: cells of a mask per patch and side; 0 for no masks.
        """
        super().__init__()
        c = decoder_width
        self.enter = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, c))  # a language model has a few large dimensions
        self.look = nn.Linear(m, c)
        self.points = nn.Parameter(initial_reference_points(num_queries))  # (N, 2), before the sigmoid
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(c, heads, 4 * c, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(c)
        self.score = nn.Linear(c, 1)
        self.box = MLP(c, [c, c, 4])
        self.leave = nn.Linear(c, d)
        self.register_buffer("patch_encoding", sinusoidal_encoding(_centres(grid), c), persistent=False)  # (P, c)
        self.masks = MaskHead(c, m, grid, mask_scale) if mask_scale else None  # last: the others begin as without it

    def forward(self, hidden: Tensor, patches: Tensor, row_of_prompt: Tensor) -> Detections:
        """hidden (E, N, d) of the queries after the bottom layers, patches (B, P, m) -> what they found.

        row_of_prompt: (E,), whose patches each prompt's queries look at.
        """
        c = self.look.out_features
        x = self.enter(hidden.float()) + sinusoidal_encoding(self.points.sigmoid(), c)  # (E, N, c)
        memory = (self.look(patches.float()) + self.patch_encoding)[row_of_prompt]  # (B, P, c) -> (E, P, c)
        states = []
        for layer in self.layers:
            x = layer(x, memory)  # (E, N, c)
            states.append(x)
        read = self.norm(torch.stack(states))  # (L, E, N, c)
        masks = self.masks(read[-1], patches, row_of_prompt) if self.masks else None  # (E, N, H, W)
        return Detections(self.score(read).squeeze(-1), self._boxes(read), self.leave(read[-1]), masks)

    def _boxes(self, read: Tensor) -> Tensor:
        """(L, E, N, c) -> (L, E, N, 4): centres from the queries' points, sizes free."""
        moved = self.box(read)  # (L, E, N, 4)
        return torch.cat([moved[..., :2] + self.points, moved[..., 2:]], -1).sigmoid()


def initial_reference_points(n: int) -> Tensor:
    """(N, 2): points spread evenly over the image (Fibonacci's lattice), before the sigmoid."""
    i = torch.arange(n) + 0.5
    points = torch.stack([i * (math.sqrt(5) - 1) / 2 % 1, i / n], -1)
    return torch.logit(points * 0.9 + 0.05)


def _centres(grid: tuple[int, int]) -> Tensor:
    """(P, 2): x and y of the patches' centres, row by row."""
    y, x = torch.meshgrid(*((torch.arange(size) + 0.5) / size for size in grid), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], -1)


def sinusoidal_encoding(points: Tensor, c: int) -> Tensor:
    """(..., 2) numbers from 0 to 1 -> (..., c): sines and cosines of half a wave to six octaves more, c / 2 for each."""
    octaves = torch.logspace(0, 6, c // 4, base=2, device=points.device)  # (c / 4,)
    phase = math.pi * points.unsqueeze(-1) * octaves  # (..., 2, c / 4)
    return torch.cat([phase.sin(), phase.cos()], -1).flatten(-2)  # (..., c)
