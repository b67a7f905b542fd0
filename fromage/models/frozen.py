"""What both towers share.

Contract: a tower is always in eval mode, none of its parameters has a gradient, and it keeps the dtype it was loaded in.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from fromage.errors import UserError

TOY = Path(__file__).parents[1] / "toy" / "backbones"  # the pair that ships with the package


class FrozenTower(nn.Module):
    """A module that nothing can set to training mode."""

    def freeze(self) -> None:
        """Stop gradients to every parameter and switch dropout off for good."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenTower:
        """Stays in eval mode."""
        return super().train(False)


def digest_of_samples(module: nn.Module) -> str:
    """16 hex digits of some numbers of every tensor of a module, the same whatever dtype it is loaded in."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        flat = value.flatten()
        digest.update(name.encode())
        digest.update(flat[:: max(1, flat.numel() // 64)].bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_device(device: str) -> None:
    """Raise UserError for a device that is not there: before towers are loaded, not after."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device}: there is none here that PyTorch can use; give cpu, cuda or mps") from error
