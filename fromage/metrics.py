"""Recall@k by exact ranks: chunked, and ties count against the model."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(queries: Tensor, gallery: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """The rank, from 1, of each query's target among the gallery: one more than the others that score as high or higher.

    queries (N, q), gallery (M, q), targets (N,) indices into the gallery -> (N,). Memory grows with chunk x M only. A
    score that is not a number ranks last.
    """
    out = []
    for q, t in zip(queries.split(chunk), targets.split(chunk), strict=True):
        scores = q @ gallery.T  # (chunk, M)
        own = scores.gather(1, t.unsqueeze(1))  # (chunk, 1)
        out.append((~(scores < own)).sum(1))  # the target itself is counted: ranks start at 1
    return torch.cat(out) if out else targets.new_empty(0)


def recall_at(rank: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Share of ranks (N,) at most k, in percent, as {'r1': ..., 'r5': ..., 'r10': ...}."""
    return {f"r{k}": 100 * (rank <= k).float().mean().item() for k in ks}


def retrieval_recalls(texts: Tensor, images: Tensor) -> dict[str, float]:
    """Recalls both ways of N pairs, texts and images (N, q) unit rows: {'t2i_r1': ..., 'i2t_r1': ...} in percent."""
    own = torch.arange(len(texts), device=texts.device)
    both = {"t2i": ranks(texts, images, own), "i2t": ranks(images, texts, own)}
    return {f"{way}_{name}": value for way, rank in both.items() for name, value in recall_at(rank).items()}
