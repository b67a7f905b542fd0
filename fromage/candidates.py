"""Approximate kinds of index: FAISS proposes candidates, and the index ranks these by their exact scores.

A kind is flat (every row is looked at) or a factory string of FAISS: IVF4096,SQ8 (lists around 4096 centres, a byte per
number), IVF4096,PQ64 (64 bytes per row), HNSW32 (a graph) ... What they give up is a share of the true neighbours, which
is measured when the index is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np

from fromage.errors import UserError

FLAT, FLAT_UP_TO = "flat", 1_000_000  # rows
TRAINED_ON, PER_LIST = 1 << 17, 40  # rows to train on: so many, or so many per list if that is more
MEASURED_WITH = 256  # rows
OVERSAMPLE = 5  # candidates per picture that is asked for, and as many as for ten at least
RECALL = 0.97  # of the ten nearest, which the search is set to reach
CHUNK = 1 << 16  # rows


def default_kind(count: int) -> str:
    """Flat up to a million rows; beyond, lists around 4 sqrt(N) centres, in powers of two, with a byte per number."""
    return FLAT if count <= FLAT_UP_TO else lists_kind(count)


def lists_kind(count: int) -> str:
    """The kind for many rows."""
    return f"IVF{2 ** round(math.log2(4 * math.sqrt(count)))},SQ8"


class Candidates:
    """Rows that are likely to be the nearest.

    Attributes:
        index: FAISS index of the rows by inner product, in their order.
        kind: its factory string.
        setting: how thoroughly it looks ('nprobe=16'); '' where there is no choice.
        recall: share of the true ten nearest that are among the candidates for ten, as measured.
    """

    def __init__(self, index: faiss.Index, kind: str, setting: str = "", recall: float = math.nan) -> None:
        self.index, self.kind, self.recall = index, kind, recall
        self.set(setting)

    @classmethod
    def train(cls, kind: str, vectors: np.ndarray, seed: int = 0) -> Candidates:
        """An empty index of a kind, trained on a sample of (N, q) rows. Raises UserError for a kind FAISS cannot make."""
        try:
            index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
            size = min(max(TRAINED_ON, PER_LIST * _lists(index)), len(vectors))
            sample = np.random.default_rng(seed).choice(len(vectors), size, replace=False)
            index.train(np.ascontiguousarray(vectors[np.sort(sample)]))
        except RuntimeError as error:
            cause = str(error).strip().rpartition(": ")[2]
            raise UserError(f"kind {kind}: FAISS cannot make it of {len(vectors)} pictures ({cause}); try flat") from error
        return cls(index, kind)

    @classmethod
    def read(cls, path: Path, kind: str, setting: str, recall: float, mapped: bool = True) -> Candidates:
        """What write wrote; mapped: from the disk as it is needed, and not to be changed."""
        return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0), kind, setting, recall)

    def write(self, path: Path) -> None:
        """Write to a file."""
        faiss.write_index(self.index, os.fspath(path))

    def set(self, setting: str) -> None:
        """Look as thoroughly as a setting says."""
        self.setting = setting
        if setting:
            faiss.ParameterSpace().set_index_parameters(self.index, setting)  # type: ignore[arg-type]

    def near(self, rows: np.ndarray, n: int) -> list[np.ndarray]:
        """For each of (B, q) unit rows the positions of n candidates, or of as many as are found."""
        _, positions = self.index.search(rows, min(n, self.index.ntotal))  # (B, n)
        return [found[found >= 0] for found in positions]

    def grow(self, vectors: np.ndarray) -> None:
        """Take in the rows of (N, q) vectors that are not in yet, and measure anew."""
        for start in range(self.index.ntotal, len(vectors), CHUNK):
            self.index.add(np.ascontiguousarray(vectors[start : start + CHUNK]))
        self.tune(vectors)

    def tune(self, vectors: np.ndarray, seed: int = 0) -> None:
        """Find the cheapest setting that reaches RECALL, and note what it reaches.

        The queries are rows of the index, of whose nearest the row itself does not count.
        """
        asked = np.random.default_rng(seed).choice(len(vectors), min(MEASURED_WITH, len(vectors)), replace=False)
        queries = np.ascontiguousarray(vectors[asked])
        truth = self._truth(vectors, queries, asked)
        for setting in self._settings():
            self.set(setting)
            found = self.near(queries, OVERSAMPLE * 10 + 1)
            shares = [len(np.intersect1d(t, f)) / max(1, len(t)) for t, f in zip(truth, found, strict=True)]
            self.recall = round(float(np.mean(shares)), 4)
            if self.recall >= RECALL:
                return

    @staticmethod
    def _truth(vectors: np.ndarray, queries: np.ndarray, asked: np.ndarray) -> list[np.ndarray]:
        k = min(11, len(vectors))
        _, nearest = faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)  # (B, 11)
        return [near[near != i][:10] for near, i in zip(nearest, asked, strict=True)]

    def _settings(self) -> Iterator[str]:
        """From the quickest to the most thorough."""
        if lists := _lists(self.index):
            return (f"nprobe={min(2**i, lists)}" for i in range(math.ceil(math.log2(lists)) + 1))
        return iter([f"efSearch={2**i}" for i in range(4, 11)] if "HNSW" in self.kind else [""])


def _lists(index: faiss.Index) -> int:
    """Lists of an inverted file; 0 for what is none."""
    try:
        return faiss.extract_index_ivf(index).nlist
    except RuntimeError:
        return 0
