"""Exact ranks, with ties counted against the model, and metrics of ranks: recall, median, MRR, NDCG, chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_normalized_dcg

TIE = 1e-12  # equal dot products of unit rows differ by less in float64, whatever the order in which BLAS sums


def ranks(
    queries: Tensor,
    gallery: Tensor,
    targets: Tensor,
    chunk: int = 1024,
    labels: Tensor | None = None,
    excluded: Tensor | None = None,
    own_stays: bool = True,
) -> Tensor:
    """(N,) ranks, from 1, of each query's own item in the gallery: 1 + the other items that score as high or higher.

    A score that is not a number ranks last. Memory grows with chunk x M, not with N x M. The result is on the CPU.

    Args:
        queries: (N, q) unit rows.
        gallery: (M, q) unit rows.
        targets: (N,) indices of the own items, or, with labels, their label.
        chunk: queries at a time.
        labels: (M,) labels of the items; of several own items the best one counts.
        excluded: (N, x) indices of items to leave out of a query's gallery.
        own_stays: whether a query's own items stay there all the same; if not, one that is left out ranks last.
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
            scores.masked_fill_(gone & ~own if own_stays else gone, -torch.inf)
        out.append(ranks_among(scores, own, TIE))
    return torch.cat(out) if out else targets.new_empty(0)


def ranks_among(scores: Tensor, own: Tensor, tie: float = 0.0) -> Tensor:
    """(N,) ranks, from 1, of the best of a query's own items by scores (N, M); own (N, M) bool marks them.

    tie: scores that differ by no more are equal.
    """
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)  # (N, 1)
    return 1 + (~own & ~(scores < best - tie)).sum(1)  # (N, M) -> (N,)


def recall_at(rank: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """R@k of ranks (N,), the share of ranks up to k, in percent: {'r1': ..., 'r5': ..., 'r10': ...}."""
    return {f"r{k}": 100 * (rank <= k).float().mean().item() for k in ks}


def rank_figures(rank: Tensor) -> dict[str, float]:
    """R@1, R@5 and R@10 of ranks (N,), in percent, and the median rank."""
    return recall_at(rank) | {"median_rank": float(statistics.median(rank.tolist()))}


def mean_reciprocal_rank(rank: Tensor) -> float:
    """MRR of ranks (N,), in percent."""
    return 100 * (1 / rank.double()).mean().item()


def ndcg(scores: Tensor, relevance: Tensor) -> float:
    """Normalised discounted cumulative gain of N rankings by scores (N, C), mean in percent; relevance (N, C), 0 to 1.

    As VisDial's challenge defines it: linear gain, each ranking cut at its number of items with relevance above 0. Items
    that tie share the gain of their places.
    """
    rows = [
        retrieval_normalized_dcg(row, wanted, top_k=max(1, int((wanted > 0).sum())))
        for row, wanted in zip(scores, relevance, strict=True)
    ]
    return 100 * torch.stack(rows).mean().item()


def chance(gallery: int, own: int = 1) -> dict[str, float]:
    """rank_figures expected of a random order of `gallery` items, of which `own` are the query's."""

    def within(k: int) -> float:
        return 1 - math.comb(max(gallery - k, 0), own) / math.comb(gallery, own)

    recalls = {f"r{k}": 100 * within(k) for k in (1, 5, 10)}
    return recalls | {"median_rank": float(next(k for k in range(1, gallery + 1) if within(k) >= 0.5))}


class Gallery(NamedTuple):
    """Images and the texts that belong to them, one or more each."""

    texts: Tensor  # (N, q) unit rows
    images: Tensor  # (M, q) unit rows
    owners: Tensor  # (N,) int64: which image each text belongs to

    def to(self, device: str) -> Gallery:
        """The same on a device."""
        return Gallery(*(field.to(device) for field in self))


def joined(parts: Iterable[Gallery]) -> Gallery:
    """One gallery of several: (N, q), (M, q), (N,)."""
    texts, images, owners, count = [], [], [], 0
    for part in parts:
        texts.append(part.texts)
        images.append(part.images)
        owners.append(part.owners + count)
        count += len(part.images)
    return Gallery(torch.cat(texts), torch.cat(images), torch.cat(owners))


def retrieval_recalls(texts: Tensor, images: Tensor, owners: Tensor | None = None) -> dict[str, float]:
    """R@1, 5 and 10 both ways of a Gallery, in percent: {'t2i_r1': ..., 'i2t_r1': ...}.

    t2i: of each text, whether its image is found. i2t: of each image, whether one of its texts is. Without owners text i
    belongs to image i.
    """
    owners = torch.arange(len(texts)) if owners is None else owners
    own = torch.arange(len(images))  # (M,)
    both = {"t2i": ranks(texts, images, owners), "i2t": ranks(images, texts, own, labels=owners)}  # (N,), (M,)
    return {f"{way}_{name}": value for way, rank in both.items() for name, value in recall_at(rank).items()}
