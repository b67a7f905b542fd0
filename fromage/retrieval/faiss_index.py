"""The image index: search, save and load; fromage.retrieval.build makes, extends and merges saved ones.

q is the width of the shared retrieval space, N the number of images in the index, B that of the queries.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple
from weakref import ref

import faiss
import numpy as np
import pyarrow as pa

from fromage.checks import check_whole
from fromage.data.image_source import Item
from fromage.errors import UserError, first_line
from fromage.models.fromage import Fromage
from fromage.retrieval.ann import FLAT, RERANK_FACTOR, ANNIndex
from fromage.retrieval.index_folder import (
    CANDIDATES,
    ITEMS,
    MILVUS,
    TEXTS,
    VECTORS,
    check_files,
    read_about,
    replacing,
    seal,
)
from fromage.retrieval.item_table import Embedded, ItemTable, to_batch, write_items
from fromage.retrieval.results import Hit


def write_rows(folder: Path, rows: Iterable[Embedded]) -> None:
    """Write unit vectors and items, some at a time, into a new folder."""

    def items(file: IO[bytes]) -> Iterator[pa.RecordBatch]:
        for vectors, batch in rows:
            file.write(vectors.astype("<f4", copy=False).tobytes())
            yield batch

    with (folder / VECTORS).open("wb") as file:
        write_items(folder / ITEMS, items(file))


def open_rows(folder: Path, width: int) -> tuple[np.ndarray, ItemTable]:
    """Map what write_rows wrote into memory: (N, width) vectors, and the items. Raises UserError if the two do not fit."""
    if not (folder / VECTORS).stat().st_size:
        raise UserError("an index needs at least one image; none is left")
    numbers, items = np.memmap(folder / VECTORS, "<f4", "r"), ItemTable.open(folder / ITEMS)
    if len(numbers) != len(items) * width:
        raise UserError(f"{folder}: {len(items)} images and {len(numbers)} numbers do not fit; build the index again")
    return numbers.reshape(len(items), width), items


NEAR_TIE = 1e-5  # FAISS rounds in float32; scores closer than this are compared again in float64
CHUNK = 1 << 14  # rows
State = list[tuple[int, int]]  # of parameters: where each lies, and how often it was written to


class Near(NamedTuple):
    """Rows near a query, in any order. n of them."""

    rows: np.ndarray  # (n,) whole numbers that rise in the order of the index
    vectors: np.ndarray  # (n, q)
    item: Callable[[int], Item]  # i -> the image of the i-th
    whole: bool  # no more can be had by asking for more


class ImageIndex:
    """An index over unit rows, where the inner product is the cosine.

    What is said here is of an index on this machine's disk; fromage.retrieval.milvus_index has the other kind.

    Attributes:
        vectors: the rows (N, q), float32; of a saved index they stay on disk and are mapped into memory.
        items: the images, row by row.
        fingerprint: of the model that embedded them; only this model's queries mean anything here.
        checkpoint: path that model was loaded from; '' if not known.
        candidates: what looks for the nearest in approximate kinds; None in a flat index, which looks at every row.
        texts: (n, q) unit rows of captions as searched for, with which the candidates are measured; often none.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        items: ItemTable,
        fingerprint: str,
        checkpoint: str = "",
        candidates: ANNIndex | None = None,
        texts: np.ndarray | None = None,
    ) -> None:
        self.vectors, self.items, self.fingerprint, self.checkpoint = vectors, items, fingerprint, checkpoint
        self.candidates, self.texts = candidates, np.empty((0, self.width), np.float32) if texts is None else texts
        self._known: tuple[Callable[[], Fromage | None], State] = (lambda: None, [])  # see require_model

    @classmethod
    def build(
        cls, embeddings: np.ndarray, items: Sequence[Item], fingerprint: str, checkpoint: str = "", kind: str = FLAT
    ) -> ImageIndex:
        """Index (N, q) rows, scaled to unit length here. Raises UserError for no rows, odd numbers or one item too few.

        kind: see fromage.retrieval.ann.
        """
        rows = unit(embeddings, "the index")
        if len(rows) == 0:
            raise UserError("an index needs at least one image; none was given")
        if len(rows) != len(items):
            raise UserError(f"{len(rows)} embeddings for {len(items)} images; give one of each")
        index = cls(rows, ItemTable([to_batch(items)]), fingerprint, checkpoint)
        index.prepare(kind)
        return index

    def prepare(self, kind: str, trained: ANNIndex | None = None) -> None:
        """Make the index one of a kind; trained: what knows the first rows of it, or none, and is to learn the others."""
        if kind.lower() != FLAT:
            self.candidates = trained or ANNIndex.train(kind, self.vectors)
            self.candidates.grow(self.vectors, self.texts)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def width(self) -> int:
        """q."""
        return self.vectors.shape[1]

    @property
    def kind(self) -> str:
        """'flat', or FAISS's factory string of the candidates."""
        return self.candidates.kind if self.candidates else FLAT

    def vectors_of(self, rows: Sequence[int]) -> np.ndarray:
        """(n, q) vectors of the rows that hits name."""
        return self.vectors[list(rows)]

    def finder(self) -> Callable[[str], Item | None]:
        """What finds an image by its id (fromage.retrieval.item_table.image_id); a second or two per million images."""
        return self.items.finder()

    def paths(self) -> pa.ChunkedArray:
        """All paths, as bytes."""
        return self.items.paths()

    def search(self, queries: np.ndarray, k: int, exclude: Collection[str] | None = None) -> list[list[Hit]]:
        """The k images nearest to each query (B, q), best first, fewer if there are not as many.

        Scores are exact in every kind. A flat index finds the true nearest, equal scores in the order of the index,
        whatever else is in the batch. The other kinds rank the nearest of their candidates.

        Args:
            queries: rows of any length but zero.
            k: images per query, at least 1.
            exclude: paths that must not be found.
        """
        check_whole("k", k, 1)
        rows = unit(queries, "the query")  # (B, q)
        if rows.shape[1] != self.width:
            raise UserError(f"queries are {rows.shape[1]} wide, the index {self.width}; use the model that built the index")
        barred = frozenset(exclude or ())
        if self.kind == FLAT:
            return self._exact(rows, k, barred)
        nearby = self._proposed(rows, RERANK_FACTOR * max(10, k + len(barred)))
        found = [self._ranked(row, near, k, barred)[0] for row, near in zip(rows, nearby, strict=True)]
        return [
            hits if len(hits) == k else self._exact(row[None], k, barred)[0]  # the candidates ran out
            for row, hits in zip(rows, found, strict=True)
        ]

    def beyond(self, query: np.ndarray, hits: Sequence[Hit], exclude: Collection[str] | None = None) -> Iterator[Hit]:
        """The hits of a search for one query (q,), and then all behind them: searched for as they are asked for."""
        given: set[int] = set()
        while len(hits) > len(given):
            for hit in hits:
                if hit.row not in given:  # approximate kinds may rank otherwise when they are asked for more
                    given.add(hit.row)
                    yield hit._replace(rank=len(given))
            hits = self.search(query[None], 2 * len(given), exclude)[0]

    def _exact(self, rows: np.ndarray, k: int, barred: frozenset[str]) -> list[list[Hit]]:
        """The true k nearest: FAISS is asked on until its last score is clearly worse."""
        first = self._nearest(rows, k + len(barred) + 1)  # (B, n)
        return [self._settled(row, near, k, barred) for row, near in zip(rows, first, strict=True)]

    def _nearest(self, rows: np.ndarray, n: int) -> list[Near]:
        """The n rows nearest to each of (B, q), up to the rounding of float32."""
        positions = faiss.knn(rows, self.vectors, min(n, len(self)), metric=faiss.METRIC_INNER_PRODUCT)[1]  # (B, n)
        return [self._at(near) for near in positions]

    def _proposed(self, rows: np.ndarray, n: int) -> list[Near]:
        """What an approximate kind takes for the n nearest."""
        assert self.candidates is not None
        return [self._at(near) for near in self.candidates.near(rows, n)]

    def _at(self, positions: np.ndarray) -> Near:
        item = lambda i: self.items[int(positions[i])]  # noqa: E731
        return Near(positions, self.vectors[positions], item, len(positions) == len(self))

    def _settled(self, row: np.ndarray, near: Near, k: int, barred: frozenset[str]) -> list[Hit]:
        hits, worst = self._ranked(row, near, k, barred)
        while not near.whole and (len(hits) < k or worst > hits[-1].score - NEAR_TIE):
            near = self._nearest(row[None], 2 * len(near.rows))[0]
            hits, worst = self._ranked(row, near, k, barred)
        return hits

    @staticmethod
    def _ranked(row: np.ndarray, near: Near, k: int, barred: frozenset[str]) -> tuple[list[Hit], float]:
        """The best k of these rows, and the worst score among all of them."""
        vectors = near.vectors.astype(np.float64)  # (n, q)
        scores = (vectors * row).sum(axis=1)  # not a product of matrices: equal rows must give equal sums, wherever they lie
        hits: list[Hit] = []
        for i in np.lexsort((near.rows, -scores)):
            item = near.item(i)
            if item.path not in barred:
                hits.append(Hit(len(hits) + 1, float(scores[i]), *item, row=int(near.rows[i])))
            if len(hits) == k:
                break
        return hits, scores.min(initial=1)

    def rows(self) -> Iterator[Embedded]:
        """All vectors with their items, in order, some at a time."""
        start = 0
        for items in self.items.slices(CHUNK):
            yield self.vectors[start : start + len(items)], items
            start += len(items)

    def save(self, folder: str | Path) -> None:
        """Write the index as a folder, whole or not at all; an index of ours that is there is replaced at once.

        Raises UserError where anything else is in the way.
        """
        with replacing(folder) as new:
            write_rows(new, self.rows())
            self.finish(new)

    def finish(self, folder: Path) -> None:
        """Write what belongs beside the vectors and items of a new folder."""
        candidates = self.candidates
        if candidates:
            candidates.write(folder / CANDIDATES)
            if len(self.texts):
                self.texts.astype("<f4", copy=False).tofile(folder / TEXTS)
        recalls = (candidates.recall, candidates.text_recall) if candidates else (1.0, 1.0)
        measured = dict(zip(("recall_at_10", "text_recall_at_10"), recalls, strict=True))
        seal(folder, self.about() | {"setting": candidates.setting if candidates else ""} | measured)

    def about(self) -> dict[str, Any]:
        """What every index.json says."""
        about = {"count": len(self), "width": self.width, "kind": self.kind}
        return about | {"fingerprint": self.fingerprint, "checkpoint": self.checkpoint}

    @classmethod
    def load(cls, folder: str | Path, fingerprint: str | None) -> ImageIndex:
        """Open a saved index, here or in Milvus.

        Raises UserError if it is damaged, if Milvus is away, or if another model than fingerprint (None: any) built it.
        """
        from fromage.retrieval.milvus_index import MilvusIndex

        folder = Path(folder).resolve()
        about = read_about(folder)
        index = MilvusIndex.open(about) if MILVUS in about else cls._read(folder, about)
        if fingerprint is not None:
            index.require(fingerprint, folder)
        return index

    @classmethod
    def _read(cls, folder: Path, about: dict[str, Any]) -> ImageIndex:
        check_files(folder, about)
        vectors, items = open_rows(folder, about["width"])
        if len(items) != about["count"] or (about["kind"] == FLAT) == (CANDIDATES in about["files"]):
            raise UserError(f"{folder}: index.json tells of another index than is there; build it again")
        index = cls(vectors, items, about["fingerprint"], about["checkpoint"])
        if about["kind"] != FLAT:
            known = about["kind"], about["setting"], about["recall_at_10"], about.get("text_recall_at_10")
            index.candidates = ANNIndex.read(folder / CANDIDATES, *known)
            if TEXTS in about["files"]:
                index.texts = np.fromfile(folder / TEXTS, "<f4").reshape(-1, index.width)  # (n, q)
        return index

    def require(self, fingerprint: str, folder: str | Path = "the index") -> None:
        """Raise UserError unless the model of this fingerprint built the index; folder is where it lies, for the message."""
        if fingerprint != self.fingerprint:
            raise UserError(
                f"{folder}: built with checkpoint {self.fingerprint} ({self.checkpoint or 'path unknown'}), not with "
                f"{fingerprint}; give the checkpoint it was built with, or build it again: fromage index build"
            )

    def require_model(self, model: Fromage) -> None:
        """As require, of a model. It is digested once, and again when it has been trained or loaded anew since."""
        model_then, state_then = self._known
        state = [(p.data_ptr(), -1 if p.is_inference() else p._version) for p in model.trained().values()]
        if model_then() is not model or state_then != state:
            self.require(model.fingerprint())
            self._known = ref(model), state


def unit(rows: np.ndarray, whose: str) -> np.ndarray:
    """(n, q) rows at unit length, float32. Raises UserError for what are no numbers, zero rows, infinities and NaN."""
    try:
        rows = np.ascontiguousarray(rows, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"embeddings of {whose} are no numbers ({first_line(error)}); search_index takes texts") from error
    if rows.ndim != 2:
        raise UserError(f"embeddings of {whose} have the shape {rows.shape}; expected (rows, width)")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)  # (n, 1)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise UserError(f"embeddings of {whose} hold zero rows, infinities or NaN; make them anew, from a sound checkpoint")
    return rows / lengths
