"""Branches: several prompts about one image in one row, and which token sees which.

The image is read once, and each branch sees the image and itself alone, at the positions it would have on its own. So a row
gives the hidden states of its prompts one by one, exactly.

    branch (B, T)   0: the part that all branches of the row see; 1, 2, ...: a branch; -1: padding
    E               prompts with queries in all rows, row by row
"""

from __future__ import annotations

import torch
from torch import Tensor


def alone(mask: Tensor) -> Tensor:
    """(B, T) bool, False at padding -> (B, T) branch numbers of rows that hold one prompt each."""
    return mask.long() - 1


def seen(new: Tensor, known: Tensor) -> Tensor:
    """Branch numbers (B, A) of the last tokens of known (B, S) -> (B, A, S) bool: which token (row) sees which (column).

    Each token sees itself, and before it the shared part and its own branch. Padding sees itself, to avoid NaN.
    """
    (_, A), S = new.shape, known.shape[1]
    before = torch.ones(A, S, dtype=torch.bool, device=new.device).tril(S - A)  # (A, S), oneself included
    theirs = (known == 0).unsqueeze(1) | (known.unsqueeze(1) == new.unsqueeze(2)) & (known >= 0).unsqueeze(1)  # (B, A, S)
    itself = torch.eye(S, dtype=torch.bool, device=new.device)[S - A :]  # (A, S)
    return theirs & before | itself


def query_places(places: Tensor, num_queries: int) -> Tensor:
    """(B, T) bool, where queries stand -> (E, N) int64: which of the B T tokens are the queries of each prompt."""
    return places.flatten().nonzero().view(-1, max(1, num_queries))


def among(places: Tensor, num_queries: int) -> Tensor:
    """(B, T) bool, where queries stand -> (B, T, T) bool: queries of one prompt see each other, also later ones."""
    prompt = torch.where(places, (places.cumsum(1) - 1) // max(1, num_queries), -1)  # (B, T)
    return (prompt.unsqueeze(1) == prompt.unsqueeze(2)) & places.unsqueeze(1)


def positions(sees: Tensor) -> Tensor:
    """(B, A, S) of `seen` -> (B, A): the position of each token, which is the number of tokens before it that it sees."""
    return sees.sum(-1) - 1
