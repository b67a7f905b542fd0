"""Figures of a ranking: exact ranks, chunked, with ties against the model, and what is made of them."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_normalized_dcg

TIE = 1e-12  # products of the same unit rows, in float64, differ by less, wherever BLAS puts them


def ranks(
    queries: Tensor,
    gallery: Tensor,
    targets: Tensor,
    chunk: int = 1024,
    labels: Tensor | None = None,
    excluded: Tensor | None = None,
) -> Tensor:
    """The rank, from 1, of each query's own item among the gallery: one more than the others that score as high or higher.

    Unit rows queries (N, q) and gallery (M, q), targets (N,) indices into the gallery -> (N,), on the CPU. Memory grows
    with chunk x M only. A score that is not a number ranks last.

    Args:
        labels: (M,) labels of the items, where targets are labels too; of several own items the best one counts.
        excluded: (N, e) indices of items that are no part of a query's gallery; its own items always are.
    """
    queries, gallery = queries.cpu().double(), gallery.cpu().double()  # not every device has float64
    targets, labels = targets.cpu(), torch.arange(len(gallery)) if labels is None else labels.cpu()
    out = []
    for start in range(0, len(queries), chunk):
        some = slice(start, start + chunk)
        scores = queries[some] @ gallery.T  # (chunk, M)
        own = labels == targets[some].unsqueeze(1)  # (chunk, M)
        if excluded is not None:
            gone = torch.zeros_like(own).scatter_(1, excluded[some].cpu(), True)
            scores.masked_fill_(gone & ~own, -torch.inf)
        out.append(ranks_among(scores, own, TIE))
    return torch.cat(out) if out else targets.new_empty(0)


def ranks_among(scores: Tensor, own: Tensor, tie: float = 0.0) -> Tensor:
    """(N, M) scores, and which items are a query's own, (N, M) bool -> (N,) ranks, from 1, of the best of these.

    tie: scores that differ by no more are equal.
    """
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)  # (N, 1)
    return 1 + (~own & ~(scores < best - tie)).sum(1)


def recall_at(rank: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Share of ranks (N,) at most k, in percent, as {'r1': ..., 'r5': ..., 'r10': ...}."""
    return {f"r{k}": 100 * (rank <= k).float().mean().item() for k in ks}


def rank_figures(rank: Tensor) -> dict[str, float]:
    """Recalls of ranks (N,), in percent, and the median rank."""
    return recall_at(rank) | {"median_rank": float(statistics.median(rank.tolist()))}


def mean_reciprocal_rank(rank: Tensor) -> float:
    """Of ranks (N,), in percent."""
    return 100 * (1 / rank.double()).mean().item()


def ndcg(scores: Tensor, relevance: Tensor) -> float:
    """Normalised discounted cumulative gain of (N, C) scores, in percent, over as many places as there are relevant items.

    relevance (N, C) in [0, 1]. As VisDial has it: linear gain, each ranking cut at the number of items with relevance
    above 0. Items that tie share the gain of their places.
    """
    rows = [
        retrieval_normalized_dcg(row, wanted, top_k=max(1, int((wanted > 0).sum())))
        for row, wanted in zip(scores, relevance, strict=True)
    ]
    return 100 * torch.stack(rows).mean().item()


def chance(gallery: int, own: int = 1) -> dict[str, float]:
    """What rank_figures gives in expectation for a random order, of a query with so many own items in the gallery."""

    def within(k: int) -> float:
        return 1 - math.comb(max(gallery - k, 0), own) / math.comb(gallery, own)

    recalls = {f"r{k}": 100 * within(k) for k in (1, 5, 10)}
    return recalls | {"median_rank": float(next(k for k in range(1, gallery + 1) if within(k) >= 0.5))}


def retrieval_recalls(texts: Tensor, images: Tensor) -> dict[str, float]:
    """Recalls both ways of N pairs, texts and images (N, q) unit rows: {'t2i_r1': ..., 'i2t_r1': ...} in percent."""
    own = torch.arange(len(texts), device=texts.device)
    both = {"t2i": ranks(texts, images, own), "i2t": ranks(images, texts, own)}
    return {f"{way}_{name}": value for way, rank in both.items() for name, value in recall_at(rank).items()}
