"""Branches: several prompts about one image in one row, and which token sees which.

The image is read once, and each branch sees the image and itself alone, at the positions it would have on its own. So a row
gives the hidden states of its prompts one by one, exactly. Rows are laid end to end, without padding between them
(fromage.models.packed_attention).

    branch (M,)     0: the part that all branches of a row see; 1, 2, ...: a branch. M tokens of all rows
    E               prompts with queries in all rows, row by row
    back            how many positions before a token another one stands; below 0: it is not seen
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fromage.models.packed_layout import PackedLayout, branch_visible

PADDING = -1  # in place of the branch of a token


class Rows(NamedTuple):
    """The tokens of B rows, one row after another.

    Attributes:
        ids: (M,) int64.
        lengths: tokens of each row.
        positions: (M,) int64, in the prompt of the token's branch.
        branch: (M,) int64.
    """

    ids: Tensor
    lengths: list[int]
    positions: Tensor
    branch: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Rows:
        """The same rows on the device."""
        ids, positions, branch = (x.to(device, non_blocking=non_blocking) for x in (self.ids, self.positions, self.branch))
        return Rows(ids, self.lengths, positions, branch)

    def layout(self) -> PackedLayout:
        """Where the tokens are, on their device."""
        return PackedLayout(self.lengths, self.ids.device, self.positions, self.branch)


class Known(NamedTuple):
    """The tokens that rows have so far, padded: (B, S) int64 each."""

    positions: Tensor
    branch: Tensor  # PADDING at padding

    @classmethod
    def of(cls, layout: PackedLayout) -> Known:
        """The tokens of a layout; one without branches has the shared part alone."""
        branch = torch.zeros_like(layout.positions) if layout.branches is None else layout.branches  # (M,)
        return cls(layout.pad_input(layout.positions), layout.pad_input(branch - PADDING) + PADDING)

    def followed_by(self, new: Known) -> Known:
        """With the tokens (B, A) of `new` after them: (B, S + A)."""
        return Known(torch.cat([self.positions, new.positions], 1), torch.cat([self.branch, new.branch], 1))

    def distances_to(self, new: Known) -> Tensor:
        """(B, A, S), how many positions before each token (B, A) of `new` each of these stands; below 0: it is not seen."""
        distance = new.positions.unsqueeze(2) - self.positions.unsqueeze(1)  # (B, A, S)
        return distance.where(branch_visible(new.branch.unsqueeze(2), self.branch.unsqueeze(1)), -1)

    def next(self) -> PackedLayout:
        """One more token in each row, after the last of its last branch."""
        branch = self.branch.amax(1)  # (B,)
        last = self.positions.where(self.branch == branch.unsqueeze(1), -1).amax(1)  # (B,)
        return PackedLayout([1] * len(branch), branch.device, last + 1, branch)


def query_places(is_query: Tensor, num_queries: int) -> Tensor:
    """(M,) bool, where queries stand -> (E, N) int64: which of the tokens are the queries of each prompt."""
    return is_query.nonzero().view(-1, max(1, num_queries))


def among(back: Tensor, queries: Tensor, layout: PackedLayout) -> Tensor:
    """(B, T, T) of a layout's tokens -> the same where queries of one prompt see each other, also later ones.

    queries: (E, N) of `query_places`.
    """
    if not queries.numel():
        return back
    prompt = torch.zeros_like(layout.positions)  # (M,): from 1 on; 0: no query
    numbers = torch.arange(1, len(queries) + 1, device=queries.device).unsqueeze(1).expand_as(queries)  # (E, N)
    prompt = layout.pad_input(prompt.index_copy(0, queries.flatten(), numbers.flatten()))  # (B, T)
    together = (prompt.unsqueeze(1) == prompt.unsqueeze(2)) & (prompt.unsqueeze(1) > 0)  # (B, T, T)
    return back.masked_fill(together, 0)
