"""Frozen towers: the base class of the language model and of the vision towers.

Contract: a tower is always in eval mode, its parameters have no gradients, and it keeps the dtype it was loaded in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from torch import nn

from fromage.errors import UserError

TOY = Path(__file__).parents[1] / "toy" / "backbones"  # the pair that ships with the package


class FrozenTower(nn.Module):
    """A module that stays in eval mode."""

    def freeze(self) -> None:
        """Stop gradients to every parameter and switch dropout off."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenTower:
        """Stays in eval mode."""
        return super().train(False)


def hold(owner: nn.Module, name: str, module: nn.Module) -> None:
    """Set an attribute of a module without registering it: the parameters of `module` belong to another one.

    owner.parameters(), state_dict() and to() do not reach it; the module that it belongs to takes care of that.
    """
    object.__setattr__(owner, name, module)


def require_weights(tower: str, missing: Collection[str]) -> None:
    """Raise UserError where weights lack parameters of their model: transformers would fill them with random numbers.

    missing: `missing_keys` of from_pretrained(..., output_loading_info=True); tied parameters are not among them.
    """
    if missing:
        raise UserError(f"{tower}: its weights lack {min(missing)} ({len(missing)} in all); fetch it again")


def digest_of_samples(module: nn.Module) -> str:
    """16 hex digits of a sample of every tensor of a module; the same in float32 and bfloat16 (float16 rounds otherwise)."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        flat = value.flatten()
        digest.update(name.encode())
        digest.update(flat[:: max(1, flat.numel() // 64)].bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
