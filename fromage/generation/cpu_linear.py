"""Linear layers at the pace of memory: a token of a single answer, on a CPU.

Such a product reads the whole weight matrix for one row. BLAS does that on one core and far below what memory gives; cut
into slices of W as a batch of products with x^T, it runs at about twice the pace, and on all cores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS = 4  # as long as it pays
SLICES = 8


class FewRows(nn.Linear):
    """A linear layer that is quick for few rows in float32 on a CPU, without gradients; else like any other."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        rows = x.numel() // self.in_features
        on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
        if not (on_cpu and 0 < rows <= ROWS) or self.out_features % SLICES or not self.weight.is_contiguous():
            return super().forward(x)
        slices = self.weight.view(SLICES, -1, self.in_features)  # (s, N / s, K)
        columns = x.reshape(rows, -1).T.expand(SLICES, -1, -1)  # (s, K, r)
        y = torch.bmm(slices, columns).flatten(0, 1).T  # (r, N)
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], -1)


def patch_linears(module: nn.Module) -> None:
    """Make every plain linear layer within a module one of these; their parameters stay."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FewRows
