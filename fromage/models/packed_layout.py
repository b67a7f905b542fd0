"""The layout of packed sequences: where each begins, its positions and branches; to padded rows and back.

A token sees itself and the tokens at earlier positions, so tokens that share a position do not see one another: this is all
that stacked [RET] tokens are (`distances`). A sequence may also end in several branches, each of which goes on from the
trunk before them and sees no other branch (PackedLayout): so what two texts begin with runs once, with gradient.

Shapes: see fromage.models. Here N counts the tokens of all sequences and T those of the longest.
"""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


def offsets(lengths: list[int]) -> list[int]:
    """The offset of each sequence among the packed tokens."""
    return [0, *accumulate(lengths)][:-1]


def to_device(values: Any, device: torch.device) -> Tensor:
    """Integers or a tensor on the host -> a tensor on the device, copied without waiting for it."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.long)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def distances(positions: Tensor) -> Tensor:
    """Positions (..., T) -> (..., T, T): how many positions before each token each other one stands; below 0: hidden.

    Another token at the same position is hidden, as later ones are.
    """
    back = positions.unsqueeze(-1) - positions.unsqueeze(-2)  # (..., T, T)
    itself = torch.eye(back.shape[-1], dtype=torch.bool, device=back.device)  # (T, T)
    return back.where((back != 0) | itself, -1)


def branch_visible(own: Tensor, theirs: Tensor) -> Tensor:
    """Whether a token of branch `own` sees earlier ones of branch `theirs`: those of the trunk (0), and its own."""
    return (theirs == 0) | (theirs == own)


class PackedLayout:
    """Where the tokens of S sequences are, packed (N, ...) and padded (S, T, ...). Built from lengths known on the host.

    Attributes:
        count: S.
        max_seqlen: T, tokens of the longest sequence.
        positions: (N,) position of each token within its sequence.
        indices: (N,) place of each token among the S T places of the padded batch.
        lengths: tokens of each sequence.
        starts: offset of each sequence among the packed tokens.
        shared: whether tokens share positions.
        branches: (N,) where sequences have branches: 0 for the trunk, else the branch a token is in.
    """

    def __init__(
        self, lengths: list[int], device: torch.device, positions: Tensor | None = None, branches: Tensor | None = None
    ) -> None:
        """lengths: tokens of each sequence; some may be 0. positions: (N,), where tokens share some. branches: as above."""
        self.count, self.max_seqlen, self.lengths = len(lengths), max(lengths), lengths
        places = [t for n in lengths for t in range(n)]
        flat = [s * self.max_seqlen + t for s, n in enumerate(lengths) for t in range(n)]
        self.positions, self.indices = to_device([places, flat], device)  # (2, N) -> (N,) each
        self.starts, self.shared, self.branches = offsets(lengths), positions is not None, branches
        if positions is not None:
            self.positions = positions

    @cached_property
    def distances(self) -> Tensor:
        """(S, T, T) of the padded sequences, padding and other branches hidden from all tokens."""
        places, padded = self.count * self.max_seqlen, (self.count, self.max_seqlen)
        after = torch.full((places,), self.max_seqlen, device=self.positions.device)  # (S T,), after every position
        back = distances(after.index_copy_(0, self.indices, self.positions).unflatten(0, padded))  # (S, T, T)
        if self.branches is None:
            return back
        branch = self.pad_input(self.branches)  # (S, T)
        return back.where(branch_visible(branch.unsqueeze(2), branch.unsqueeze(1)), -1)

    def pad_input(self, packed: Tensor) -> Tensor:
        """(N, ...) -> (S, T, ...), zeros after each sequence."""
        return _PadInput.apply(packed, self.indices, self.count * self.max_seqlen).unflatten(
            0, (self.count, self.max_seqlen)
        )

    def pack(self, padded: Tensor) -> Tensor:
        """(S, T', ...) with T' >= T -> (N, ...)."""
        return self.unpad_input(padded[:, : self.max_seqlen])

    def unpad_input(self, padded: Tensor) -> Tensor:
        """(S, T, ...) -> (N, ...)."""
        return _UnpadInput.apply(padded.flatten(0, 1), self.indices)


class _PadInput(torch.autograd.Function):
    """Each place is written once, so padding and unpadding are each other's gradient, without accumulation."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, flat: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(flat)
        return packed.new_zeros(places, *packed.shape[1:]).index_copy_(0, flat, packed)  # (N, ...) -> (S T, ...)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None  # (S T, ...) -> (N, ...)


class _UnpadInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, flat: Tensor) -> Tensor:
        ctx.save_for_backward(flat)
        ctx.places = len(padded)
        return padded.index_select(0, flat)  # (S T, ...) -> (N, ...)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.new_zeros(ctx.places, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None
