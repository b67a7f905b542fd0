"""Approximate kinds of index: FAISS proposes candidates, and the index ranks these by their exact scores.

A kind is flat (every row is looked at) or a factory string of FAISS: IVF4096,SQ8 (lists around 4096 centres, a byte per
number), IVF4096,PQ64 (64 bytes per row), HNSW32 (a graph) ... What they give up is a share of the true neighbours, which
is measured when the index is written: with images as queries, and with texts where there are some. How thoroughly FAISS
looks and how many candidates are ranked is chosen then, so that RECALL is reached.

auto:small is the first of three kinds that reaches it: RaBitQ (a bit per number, arXiv 2405.12497), product quantisation
with four bits per four numbers, both scanned in registers (fast-scan), and four bits per number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from fromage.errors import UserError
from fromage.retrieval.chosen import Chosen, knn
from fromage.retrieval.index_spec import FLAT
from fromage.retrieval.rerank import RERANK_FACTOR, as_float32

FLAT_UP_TO = 1_000_000  # rows
TRAINED_ON, PER_LIST = 1 << 17, 40  # rows to train on: so many, or so many per list if that is more
MEASURED_WITH = 256  # queries of each sort
RECALL = 0.97  # of the ten nearest, which the search is set to reach
CHUNK = 1 << 16  # rows
SMALL, LISTS_FROM = "auto:small", 10_000  # rows from which small kinds have lists
FACTORS = tuple(RERANK_FACTOR << i for i in range(5))  # candidates per image that is asked for: 5 to 80
SCANNED = 64  # rows that are scanned in the time in which a candidate is ranked


def default_kind(count: int) -> str:
    """Flat up to a million rows; beyond, lists around 4 sqrt(N) centres, in powers of two, with a byte per number."""
    return FLAT if count <= FLAT_UP_TO else lists_kind(count)


def check_kind(kind: str | None, width: int) -> None:
    """Raise UserError for a kind that cannot be made for rows of width q; None is any."""
    if kind and kind.lower() not in (FLAT, SMALL):
        ANNIndex.empty(kind, width)


def lists_kind(count: int) -> str:
    """The kind for many rows."""
    return f"IVF{2 ** round(math.log2(4 * math.sqrt(count)))},SQ8"


def small_kinds(count: int, width: int) -> Iterator[str]:
    """The kinds of auto:small that the installed FAISS has, the smallest first."""
    lists = f"{lists_kind(count).partition(',')[0]}," if count >= LISTS_FROM else ""
    for codes in ("RaBitQfs", f"PQ{max(1, width // 4)}x4fs", "SQ4"):
        try:
            check_kind(kind := lists + codes, width)
        except UserError:
            continue
        yield kind


class ANNIndex:
    """Rows that are likely to be the nearest.

    Attributes:
        index: FAISS index of the rows by inner product, in their order.
        kind: its factory string.
        setting: how thoroughly it looks ('nprobe=16'); '' where there is no choice.
        recall: share of an image's true ten nearest that are among the candidates for ten, as measured.
        text_recall: and of a text's; None where no texts were at hand.
        factor: candidates per image that is asked for.
    """

    def __init__(
        self,
        index: faiss.Index,
        kind: str,
        setting: str = "",
        recall: float = math.nan,
        text_recall: float | None = None,
        factor: int = RERANK_FACTOR,
    ) -> None:
        self.index, self.kind, self.recall, self.text_recall, self.factor = index, kind, recall, text_recall, factor
        self.set(setting)

    @classmethod
    def made(cls, kind: str, vectors: np.ndarray, texts: np.ndarray) -> ANNIndex:
        """An index of a kind, also auto:small, of (N, q) rows; arguments as of tune. Raises UserError as empty does."""
        for each in small_kinds(*vectors.shape) if kind.lower() == SMALL else [kind]:
            index = cls.train(each, vectors)
            index.grow(vectors, texts)
            if index.reaches():
                break
        return index

    def reaches(self) -> bool:
        """Whether every sort of query finds RECALL of its nearest."""
        return self.recall >= RECALL and (self.text_recall is None or self.text_recall >= RECALL)

    @classmethod
    def empty(cls, kind: str, width: int) -> ANNIndex:
        """An index of a kind, for rows of width q, that has learnt nothing. Raises UserError for a kind FAISS has not."""
        with _made(kind):
            return cls(faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT), kind)

    @classmethod
    def train(cls, kind: str, vectors: np.ndarray, seed: int = 0) -> ANNIndex:
        """An index of a kind, trained on a sample of (N, q) rows, none of which is in it. Raises UserError as empty does."""
        made = cls.empty(kind, vectors.shape[1])
        size = min(max(TRAINED_ON, PER_LIST * _lists(made.index)), len(vectors))
        sample = np.random.default_rng(0).choice(len(vectors), size, replace=False)  # (size,)
        with _made(f"{kind} of {len(vectors)} images"):
            made.index.train(np.ascontiguousarray(as_float32(vectors[np.sort(sample)])))
        return made

    @classmethod
    def read(cls, path: Path, *known: Any, mapped: bool = True) -> ANNIndex:
        """What write wrote. Raises UserError where it is damaged.

        known: kind and all after it; mapped: from the disk as it is needed, and not to be changed.
        """
        try:
            return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0), *known)
        except RuntimeError as error:
            raise UserError(f"{path}: is damaged ({_cause(error)}); build the index again") from error

    def write(self, path: Path) -> None:
        """Write to a file."""
        faiss.write_index(self.index, os.fspath(path))

    def set(self, setting: str) -> None:
        """Look as thoroughly as a setting says."""
        self.setting = setting
        if setting:
            faiss.ParameterSpace().set_index_parameters(self.index, setting)  # type: ignore[arg-type]

    def search(self, rows: np.ndarray, n: int, chosen: Chosen | None = None) -> list[np.ndarray]:
        """For each of (B, q) unit rows the positions of n candidates, or of as many as are found.

        chosen: the rows that a filter lets pass; lists and graphs are then looked at the more, the fewer these are. Kinds
        that know no filters propose more, of which those that pass are kept.
        """
        if chosen is not None and (among := _among(self.index, chosen, n)):
            positions = self.index.search(rows, min(n, len(chosen)), params=among)[1]  # (B, n)
        else:
            more = 1 if chosen is None else 2 / chosen.share
            positions = self.index.search(rows, min(math.ceil(n * more), self.index.ntotal))[1]  # (B, n or more)
            if chosen is not None:
                return [found[chosen.has(found)][:n] for found in (found[found >= 0] for found in positions)]
        return [found[found >= 0] for found in positions]

    def grow(self, vectors: np.ndarray, texts: np.ndarray) -> None:
        """Take in the rows of (N, q) vectors that are not in yet, and measure again; arguments as of tune."""
        for start in range(self.index.ntotal, len(vectors), CHUNK):
            self.index.add(np.ascontiguousarray(as_float32(vectors[start : start + CHUNK])))
        self.tune(vectors, texts)

    def tune(self, vectors: np.ndarray, texts: np.ndarray) -> None:
        """Find the cheapest setting and number of candidates that reach RECALL with every sort of query; note that.

        The cost is that of the rows scanned and the candidates ranked. Where nothing reaches RECALL, the best is taken.

        Args:
            vectors: (N, q) unit rows of the images. Some of them ask; the image itself is none of its nearest.
            texts: (n, q) unit rows that texts ask with, or none.
        """
        asked = np.random.default_rng(0).choice(len(vectors), min(MEASURED_WITH, len(vectors)), replace=False)
        images = np.ascontiguousarray(as_float32(vectors[asked]))  # (n, q)
        alike = [near[near != i][:10] for near, i in zip(knn(images, vectors, 11), asked, strict=True)]
        meant = knn(texts, vectors, 10)  # (n, 10)
        best: tuple[bool, float, float] | None = None  # reached, recall that counts, -cost
        chosen: tuple[str, int, float, float | None] = "", RERANK_FACTOR, math.nan, None
        for setting in self._settings():
            self.set(setting)
            scanned = self._scanned(len(vectors)) / SCANNED
            if best and best[0] and scanned + 10 * RERANK_FACTOR >= -best[2]:
                break  # a more thorough one costs more
            near, meant_near = self.search(images, 10 * FACTORS[-1] + 1), self.search(texts, 10 * FACTORS[-1])
            for factor in FACTORS:
                recall = self._share(alike, near, 10 * factor + 1)
                texts_recall = self._share(meant, meant_near, 10 * factor) if len(texts) else None
                least = min(recall, 1.0 if texts_recall is None else texts_recall)
                found = (least >= RECALL, 0.0 if least >= RECALL else least, -scanned - 10 * factor)
                if best is None or found > best:
                    best, chosen = found, (setting, factor, recall, texts_recall)
        setting, self.factor, self.recall, self.text_recall = chosen
        self.set(setting)

    def _scanned(self, count: int) -> float:
        """Rows that a query looks at with the present setting, of so many."""
        name, _, value = self.setting.partition("=")
        return count * int(value) / _lists(self.index) if name == "nprobe" else int(value or count)

    @staticmethod
    def _share(true: Iterable[np.ndarray], found: Iterable[np.ndarray], n: int) -> float:
        """The share of the true neighbours that is among the first n found."""
        shares = [len(np.intersect1d(t, f[:n])) / max(1, len(t)) for t, f in zip(true, found, strict=True)]
        return round(float(np.mean(shares)), 4)

    def _settings(self) -> Iterator[str]:
        """From the quickest to the most thorough."""
        if lists := _lists(self.index):
            return (f"nprobe={min(2**i, lists)}" for i in range(math.ceil(math.log2(lists)) + 1))
        return iter([f"efSearch={2**i}" for i in range(4, 11)] if "HNSW" in self.kind else [""])


@contextmanager
def _made(what: str) -> Iterator[None]:
    """Turn FAISS's errors into ours."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"kind {what}: FAISS cannot make it ({_cause(error)}); try flat") from error


def _cause(error: RuntimeError) -> str:
    """What FAISS says, without the place in its source."""
    return str(error).strip().rpartition(": ")[2]


def _among(index: faiss.Index, chosen: Chosen, n: int) -> Any:
    """What tells FAISS to look among some rows alone, about as many as it does without; None for kinds that cannot."""
    made: Any = faiss  # whose stubs know fewer classes and arguments
    index, sel = faiss.downcast_index(index), chosen.selector
    if isinstance(index, faiss.IndexPreTransform):
        inner = _among(index.index, chosen, n)
        return inner and made.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return made.SearchParametersIVF(sel=sel, nprobe=min(index.nlist, math.ceil(index.nprobe / chosen.share)))
    if isinstance(index, faiss.IndexHNSW):
        return made.SearchParametersHNSW(sel=sel, efSearch=math.ceil(max(index.hnsw.efSearch, n) / chosen.share))
    return made.SearchParameters(sel=sel) if isinstance(index, (faiss.IndexFlat, faiss.IndexScalarQuantizer)) else None


def _lists(index: faiss.Index) -> int:
    """Lists of an inverted file; 0 for what is none."""
    try:
        return faiss.extract_index_ivf(index).nlist
    except RuntimeError:
        return 0
