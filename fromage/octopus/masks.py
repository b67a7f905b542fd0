"""Masks of what was recognised: a head on the DETR decoder, and its loss. An option, off by default: model.mask_scale.

Octopus (appendix B) names a mask head on the decoder, not its design. Here a mask is the product of a query's embedding
with upsampled features, as in MaskFormer (Cheng et al., NeurIPS 2021, section 3.3); upsampling by transposed convolutions
is that of SAM's decoder (Kirillov et al., ICCV 2023). Weights of the loss are Mask2Former's (Cheng et al., CVPR 2022).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import MLP

SCALES = (2, 4, 8, 16)  # cells of a mask per patch and side
MASK, DICE = 5.0, 5.0  # weights of cross-entropy and dice loss


class MaskHead(nn.Module):
    """Decoder states and patches -> a mask for each query.

    Attributes:
        size: H and W of the masks: scale times the grid of patches.
    """

    def __init__(self, c: int, m: int, grid: tuple[int, int], scale: int) -> None:
        """c: width of the decoder, a multiple of 8. m, grid: as of the Recognizer. scale: 2, 4, 8 or a higher power of 2."""
        super().__init__()
        self.grid, self.size = grid, (scale * grid[0], scale * grid[1])
        self.look = nn.Linear(m, c)
        widths = [c, *[c // 2] * (scale.bit_length() - 2), c // 4]
        steps = [self._doubled(a, b, last=i + 2 == len(widths)) for i, (a, b) in enumerate(pairwise(widths))]
        self.upsample = nn.Sequential(*(layer for step in steps for layer in step))
        self.embed = MLP(c, [c, c, c // 4])

    @staticmethod
    def _doubled(a: int, b: int, last: bool) -> list[nn.Module]:
        """(B, a, h, w) -> (B, b, 2 h, 2 w)."""
        return [nn.ConvTranspose2d(a, b, 4, 2, 1), *([] if last else [nn.GroupNorm(1, b), nn.GELU()])]

    def forward(self, states: Tensor, patches: Tensor, rows: Tensor) -> Tensor:
        """states (E, N, c) of the decoder's last layer, patches (B, P, m), rows (E,) -> (E, N, H, W) logits."""
        features = self.look(patches.float()).transpose(1, 2).unflatten(2, self.grid)  # (B, c, rows, columns)
        cells = self.upsample(features)[rows]  # (B, c / 4, H, W) -> (E, c / 4, H, W)
        return torch.einsum("enk,ekhw->enhw", self.embed(states), cells)


def mask_losses(logits: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Means over M objects of binary cross-entropy per cell ('mask') and dice loss ('dice').

    logits (M, H, W); wanted (M, H, W), the share of each cell that is covered. Of no object both are 0, with a gradient.
    Dice: Milletari et al., 3DV 2016, with 1 added above and below, as in DETR.
    """
    many, wanted = max(1, len(logits)), wanted.float()
    crossed = F.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none").mean((1, 2))  # (M,)
    likely = logits.float().sigmoid()  # (M, H, W)
    both, each = (likely * wanted).sum((1, 2)), likely.sum((1, 2)) + wanted.sum((1, 2))  # (M,)
    return {"mask": crossed.sum() / many, "dice": (1 - (2 * both + 1) / (each + 1)).sum() / many}


def at_size(logits: Tensor, width: int, height: int) -> Tensor:
    """(H, W) logits of a mask -> (height, width) bool: the mask in an image of that size, by bilinear interpolation."""
    return F.interpolate(logits.float()[None, None], (height, width), mode="bilinear")[0, 0] > 0
