"""The image index on this machine's disk: its rows are mapped into memory, and FAISS looks among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.retrieval.ann import ANNIndex, check_kind, default_kind
from fromage.retrieval.base import FLAT, ImageIndex, IndexSpec
from fromage.retrieval.index_folder import (
    CANDIDATES,
    INDEX,
    ITEMS,
    TEXTS,
    VECTORS,
    check_files,
    open_rows,
    replacing,
    seal,
    write_rows,
)
from fromage.retrieval.item_table import Embedded, ItemTable, check_there, encoded, to_batch, without
from fromage.retrieval.rerank import Near, unit

CHUNK = 1 << 14  # rows


class FaissIndex(ImageIndex):
    """An index of rows on this disk, or in memory.

    Attributes:
        vectors: the rows (N, q), float32; of a saved index they stay on disk and are mapped into memory.
        items: the images, row by row.
    """

    backend = "faiss"

    def __init__(
        self,
        vectors: np.ndarray,
        items: ItemTable,
        fingerprint: str,
        checkpoint: str = "",
        candidates: ANNIndex | None = None,
        texts: np.ndarray | None = None,
    ) -> None:
        self.vectors, self.items, self.candidates = vectors, items, candidates  # (N, q), N
        super().__init__(fingerprint, checkpoint, texts)

    @classmethod
    def build(
        cls, embeddings: np.ndarray, items: Sequence[Item], fingerprint: str, checkpoint: str = "", kind: str = FLAT
    ) -> FaissIndex:
        """Index (N, q) rows, scaled to unit length here. Raises UserError for no rows, odd numbers or one item too few.

        kind: see fromage.retrieval.ann.
        """
        rows = unit(embeddings, "the index")  # (N, q)
        if len(rows) == 0:
            raise UserError("an index needs at least one image; none was given")
        if len(rows) != len(items):
            raise UserError(f"{len(rows)} embeddings for {len(items)} images; give one of each")
        index = cls(rows, ItemTable([to_batch(items)]), fingerprint, checkpoint)
        index._prepare(kind)
        return index

    def _prepare(self, kind: str, trained: ANNIndex | None = None) -> None:
        """Make the index one of a kind; trained: see build.write_index."""
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
        """What finds an image by its id; takes a second or two per million images."""
        return self.items.finder()

    def paths(self) -> pa.ChunkedArray:
        """All paths, as bytes."""
        return self.items.paths()

    def rows(self) -> Iterator[Embedded]:
        """All vectors with their items, in order, some at a time."""
        start = 0
        for items in self.items.slices(CHUNK):
            yield self.vectors[start : start + len(items)], items
            start += len(items)

    def nearest(self, queries: np.ndarray, n: int) -> list[Near]:
        """The n rows nearest to each of (B, q) unit queries, up to the rounding of float32."""
        positions = faiss.knn(queries, self.vectors, min(n, len(self)), metric=faiss.METRIC_INNER_PRODUCT)[1]  # (B, n)
        return [self._at(row) for row in positions]

    def propose(self, queries: np.ndarray, n: int) -> list[Near]:
        """What the candidates take for the n nearest to each of (B, q) unit queries."""
        assert self.candidates is not None
        return [self._at(row) for row in self.candidates.search(queries, n)]

    def _at(self, positions: np.ndarray) -> Near:
        item = lambda i: self.items[int(positions[i])]  # noqa: E731
        return Near(positions, self.vectors[positions], item, len(positions) == len(self))

    # --- on disk ------------------------------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """What index.json says of the index."""
        recalls = (self.candidates.recall, self.candidates.text_recall) if self.candidates else (1.0, 1.0)
        return {
            "backend": self.backend,
            "count": len(self),
            "width": self.width,
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "checkpoint": self.checkpoint,
            "setting": self.candidates.setting if self.candidates else "",
            "recall_at_10": recalls[0],
            "text_recall_at_10": recalls[1],
        }

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """See ImageIndex.save; an index that is there is replaced at once."""
        with replacing(folder, overwrite) as new:
            write_rows(new, self.rows())
            self._finish(new)

    def _finish(self, folder: Path) -> None:
        """Write what belongs beside the vectors and items of a new folder."""
        if self.candidates:
            self.candidates.write(folder / CANDIDATES)
            if len(self.texts):
                self.texts.astype("<f4", copy=False).tofile(folder / TEXTS)
        seal(folder, self.about())

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any]) -> FaissIndex:
        """The index of a folder whose index.json says `about`. Raises UserError where it is damaged."""
        files = about["files"].keys()
        if not {VECTORS, ITEMS} <= files <= {VECTORS, ITEMS, CANDIDATES, TEXTS}:
            raise INDEX.unreadable(folder, "its files are not those of an index")
        check_files(folder, about)
        vectors, items = open_rows(folder, about["width"])  # (N, q)
        if len(items) != about["count"] or (about["kind"] == FLAT) == (CANDIDATES in files):
            raise INDEX.unreadable(folder, "tells of another index than is there")
        index = cls(vectors, items, about["fingerprint"], about["checkpoint"])
        if about["kind"] != FLAT:
            known = about["kind"], about["setting"], about["recall_at_10"], about.get("text_recall_at_10")
            index.candidates = ANNIndex.read(folder / CANDIDATES, *known)
            if TEXTS in files:
                index.texts = np.fromfile(folder / TEXTS, "<f4").reshape(-1, index.width)  # (n, q)
        return index

    @classmethod
    def check(cls, kind: str | None, width: int, where: str = "") -> None:
        """Raise UserError for a kind that FAISS cannot make for rows of width q; None is any."""
        check_kind(kind, width)

    @classmethod
    def write(cls, out: str | Path, rows: Iterable[Embedded], spec: IndexSpec) -> FaissIndex:
        """Stream unit rows into a folder."""
        check_kind(spec.kind, spec.width)
        with replacing(out, spec.overwrite) as new:
            write_rows(new, rows)
            index = cls(*open_rows(new, spec.width), spec.fingerprint, spec.checkpoint, texts=spec.texts)
            index._prepare(spec.kind or default_kind(len(index)), spec.trained)
            index._finish(new)
        return cls.open(out := Path(out).resolve(), INDEX.read(out))

    @classmethod
    def drop(cls, about: dict[str, Any]) -> None:
        """Nothing: all of it is in its folder."""

    # --- changing a saved index ---------------------------------------------------------------------------------------

    def add(self, folder: str | Path, rows: Iterable[Embedded]) -> FaissIndex:
        """The index in this folder with rows put behind its own; what its candidates have learnt is kept."""
        return self._rewrite(folder, chain(self.rows(), without(rows, self.paths())), self.learnt(folder))

    def remove(self, folder: str | Path, paths: Sequence[str]) -> FaissIndex:
        """The index in this folder without the images at these paths. Raises UserError for a path that is not there."""
        names = encoded(paths)
        barred = pa.chunked_array([pa.array(names, pa.binary())])
        check_there(folder, names, set(self.paths().filter(pc.is_in(self.paths(), value_set=barred)).to_pylist()))
        trained = self.learnt(folder)
        if trained:
            trained.index.reset()  # forgets the rows, not the training
        return self._rewrite(folder, without(self.rows(), barred), trained)

    def _rewrite(self, folder: str | Path, rows: Iterable[Embedded], trained: ANNIndex | None) -> FaissIndex:
        spec = IndexSpec(self.width, self.fingerprint, self.checkpoint, self.kind, trained, self.texts, overwrite=True)
        return self.write(folder, rows, spec)

    def learnt(self, folder: str | Path) -> ANNIndex | None:
        """The candidates of the index in this folder, in memory, where they can be changed; None in a flat index."""
        old = self.candidates
        return old and ANNIndex.read(Path(folder) / CANDIDATES, old.kind, old.setting, old.recall, mapped=False)
