"""Exact ranks, with ties counted against the model, and metrics of ranks: recall, median, MRR, NDCG, chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_normalized_dcg

TIE = 1e-12  # equal dot products of unit rows differ by less in float64, whatever the order in which BLAS sums


def ranks(queries: Tensor, gallery: Tensor, targets: Tensor, chunk: int = 1024, labels: Tensor | None = None) -> Tensor:
    """(N,) ranks, from 1, of each query's own item in the gallery: 1 + the other items that score as high or higher.

    A score that is not a number ranks last. Memory grows with chunk x M, not with N x M. The result is on the CPU.

    Args:
        queries: (N, q) unit rows.
        gallery: (M, q) unit rows.
        targets: (N,) indices of the own items, or, with labels, their label.
        chunk: queries at a time.
        labels: (M,) labels of the items; of several own items the best one counts.
    """
    targets, labels = targets.cpu(), torch.arange(len(gallery)) if labels is None else labels.cpu()
    out = [
        ranks_among(scores, labels == targets[some].unsqueeze(1), TIE)  # (chunk,)
        for some, scores in _scores(queries, gallery, chunk)
    ]
    return torch.cat(out) if out else targets.new_empty(0)


def _scores(queries: Tensor, gallery: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Which queries, and their (chunk, M) scores in float64, on the CPU: not every device has float64."""
    queries, gallery = queries.cpu().double(), gallery.cpu().double()
    for start in range(0, len(queries), chunk):
        some = slice(start, start + chunk)
        yield some, queries[some] @ gallery.T


Items = Sequence[Sequence[int]]  # for each query, numbers of items of the gallery
ABSENT = 1 << 40  # a place, where a query has fewer right items than another


class Scope(NamedTuple):
    """Which items of a gallery a query is compared with.

    Attributes:
        excluded: items that each query leaves out; None for none.
        among: the items that each query has, all others left out; None for all.
        own_stays: whether a query's right items stay where they are left out; if not, they come last.
    """

    excluded: Items | None = None
    among: Items | None = None
    own_stays: bool = True

    def left_out(self, some: slice, count: int) -> Tensor:
        """(chunk, M) bool: what these queries leave out of `count` items."""
        gone = marked(self.among[some], count).logical_not() if self.among is not None else None
        if self.excluded is not None:
            excluded = marked(self.excluded[some], count)
            gone = excluded if gone is None else gone | excluded
        return torch.tensor(False) if gone is None else gone


WHOLE = Scope()


def marked(items: Items, count: int) -> Tensor:
    """(N, count) bool: the items of each query."""
    rows = [row for row, some in enumerate(items) for _ in some]
    out = torch.zeros(len(items), count, dtype=torch.bool)
    out[rows, [item for some in items for item in some]] = True
    return out


def places(queries: Tensor, gallery: Tensor, right: Items, scope: Scope = WHOLE, chunk: int = 256) -> Tensor:
    """(N, R) places, from 1, that the right items of N queries take in the order of scores, ascending.

    At most R items are right for a query; where there are fewer, the rest is ABSENT. Other items that score as high as a
    right one, or that have a score that is not a number, stand before it. queries (N, q) and gallery (M, q) are unit rows;
    chunk: queries at a time. The result is on the CPU; its first column has ranks as `ranks` gives them.
    """
    most = max(map(len, right), default=1)
    out = torch.full((len(queries), most), ABSENT)
    for some, scores in _scores(queries, gallery, chunk):
        own = marked(right[some], len(gallery))  # (chunk, M)
        gone = scope.left_out(some, len(gallery))
        scores.masked_fill_(gone & ~own if scope.own_stays else gone, -torch.inf)
        for row, items in enumerate(right[some]):
            other = scores[row][~own[row]]  # (M - right,)
            before = [int((~(other < score - TIE)).sum()) for score in scores[row, list(dict.fromkeys(items))]]
            out[some.start + row, : len(before)] = torch.tensor(sorted(before)) + torch.arange(1, len(before) + 1)
    return out


def best(queries: Tensor, gallery: Tensor, k: int, scope: Scope = WHOLE, chunk: int = 256) -> list[list[int]]:
    """The k items that score highest for each query, the best first; fewer where a query has no more.

    Of items that score alike the first ones in the gallery come first.
    """
    out = []
    for some, scores in _scores(queries, gallery, chunk):
        gone = scope.left_out(some, len(gallery)).expand_as(scores)  # (chunk, M)
        scores = scores.masked_fill(gone, -torch.inf)
        least = scores.topk(min(k, len(gallery))).values[:, -1:]  # (chunk, 1); topk orders equal scores as it likes
        for row, near, out_of in zip(scores, ~(scores < least), gone, strict=True):
            at = near.nonzero().flatten()
            order = at[row[at].sort(descending=True, stable=True).indices[:k]]
            out.append(order[~out_of[order]].tolist())
    return out


def ranks_among(scores: Tensor, own: Tensor, tie: float = 0.0) -> Tensor:
    """(N,) ranks, from 1, of the best of a query's own items by scores (N, M); own (N, M) bool marks them.

    tie: scores that differ by no more are equal.
    """
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)  # (N, 1)
    return 1 + (~own & ~(scores < best - tie)).sum(1)  # (N, M) -> (N,)


def recall_at(rank: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """R@k of ranks (N,), the share of ranks up to k, in percent: {'r1': ..., 'r5': ..., 'r10': ...}."""
    return {f"r{k}": 100 * (rank <= k).double().mean().item() for k in ks}


def mean_average_precision(place: Tensor, ks: Sequence[int] = (5, 10, 25, 50)) -> dict[str, float]:
    """mAP@k of places (N, R), in percent: {'map5': ..., 'map10': ...}, as CIRCO's evaluation defines it.

    AP@k = sum of the precisions at the places up to k that right items take / min(k, number of right items).
    """
    count = (place < ABSENT).sum(1)  # (N,)
    precision = torch.arange(1, place.shape[1] + 1) / place.double()  # (N, R)
    means = [((precision * (place <= k)).sum(1) / count.clamp(max=k)).mean() for k in ks]
    return {f"map{k}": 100 * mean.item() for k, mean in zip(ks, means, strict=True)}


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
    median = next(k for k in range(1, gallery + 1) if chance_within(k, gallery, own) >= 0.5)
    return chance_recall(gallery, own) | {"median_rank": float(median)}


def chance_within(k: int, gallery: int, own: int = 1) -> float:
    """The probability that one of `own` items is among the first k of a random order of `gallery` items."""
    return 1 - math.comb(max(gallery - k, 0), own) / math.comb(gallery, own)


def chance_recall(gallery: int, own: int = 1, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """recall_at expected of a random order."""
    return {f"r{k}": 100 * chance_within(k, gallery, own) for k in ks}


def chance_average_precision(gallery: int, own: int = 1, ks: Sequence[int] = (5, 10, 25, 50)) -> dict[str, float]:
    """mean_average_precision expected of a random order.

    Place i is a right item's with probability own / gallery; then (i - 1) (own - 1) / (gallery - 1) right ones come before.
    """
    others = (own - 1) / max(gallery - 1, 1)
    terms = [own / gallery * (1 + (i - 1) * others) / i for i in range(1, gallery + 1)]
    return {f"map{k}": 100 * sum(terms[:k]) / min(own, k) for k in ks}


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
