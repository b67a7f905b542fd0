"""Texts of different lengths in one tensor, and which of its places hold a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def pad(rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"] = "right") -> tuple[Tensor, Tensor]:
    """Lists of integers -> (B, T) int64, padded to the longest of them, and (B, T) bool, False at padding."""
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, value, side)  # (B, T)
    mask = token_mask([len(row) for row in rows], ids.shape[1], ids.device)  # (B, T)
    return ids, mask if side == "right" else mask.flip(1)


def token_mask(lengths: Sequence[int], places: int, device: torch.device) -> Tensor:
    """(B, places) bool: the places of right-padded texts of these lengths that hold a token."""
    return torch.arange(places, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)  # (T,) < (B, 1)
