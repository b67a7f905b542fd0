"""The image index on this machine's disk: its rows are mapped into memory, and FAISS looks among them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.retrieval.ann import ANNIndex, check_kind, default_kind
from fromage.retrieval.base import ImageIndex
from fromage.retrieval.chosen import Chosen, knn
from fromage.retrieval.image_root import ImageAccess, ImageRoot
from fromage.retrieval.index_folder import (
    CANDIDATES,
    INDEX,
    ITEMS,
    METADATA,
    ROUNDED,
    TEXTS,
    VECTORS,
    check_files,
    halve,
    open_rows,
    replacing,
    write_about,
    write_rows,
)
from fromage.retrieval.index_spec import FLAT, IndexSpec
from fromage.retrieval.item_table import Embedded, ItemTable, to_batch, without
from fromage.retrieval.metadata import NO_TABLE, Joined, Metadata
from fromage.retrieval.rerank import RERANK_FACTOR, Near, as_float32, unit
from fromage.retrieval.table_file import Table

CHUNK = 1 << 14  # rows
FILTERS = 4  # the last ones, whose rows are kept
FILES = {VECTORS, ROUNDED, ITEMS, METADATA, CANDIDATES, TEXTS}


class FaissIndex(ImageIndex):
    """An index of rows on this disk, or in memory.

    Attributes:
        vectors: the rows (N, q), float32, or float16 in a saved index that is not flat; they stay on disk there, mapped into
            memory.
        items: the images, row by row.
        metadata: columns that searches can be filtered by; None where the index was built without a table.
    """

    backend = "faiss"
    moves_root = True

    def __init__(
        self,
        vectors: np.ndarray,
        items: ItemTable,
        fingerprint: str,
        *,
        checkpoint: str = "",
        candidates: ANNIndex | None = None,
        texts: np.ndarray | None = None,
        place: ImageAccess | None = None,
        kind: str = "",
        metadata: Metadata | None = None,
    ) -> None:
        """kind: of an index whose candidates are not believed; others have that of their candidates."""
        self.vectors, self.candidates, self._kind, self.metadata = vectors, candidates, kind, metadata  # (N, q)
        self.items = items.having(items.root, metadata.over if metadata else None)  # N
        self._chosen = lru_cache(FILTERS)(self._choose)
        super().__init__(fingerprint, checkpoint, texts, place)

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
        return cls.in_memory([(rows, to_batch(items))], fingerprint, kind, checkpoint=checkpoint)

    @classmethod
    def in_memory(
        cls, rows: Iterable[Embedded], fingerprint: str, kind: str | None = None, *, checkpoint: str = ""
    ) -> FaissIndex:
        """Index unit rows, of which there is one at least, without a folder. kind: None chooses by the number of rows."""
        vectors, items = zip(*rows, strict=True)
        index = cls(np.concatenate(vectors), ItemTable(items), fingerprint, checkpoint=checkpoint)  # (N, q)
        index._prepare(default_kind(len(index)) if kind is None else kind)
        return index

    def _prepare(self, kind: str, trained: ANNIndex | None = None) -> None:
        """Make the index one of a kind; trained: as of IndexSpec."""
        if trained and kind.lower() != FLAT:
            self.candidates = trained
            trained.grow(self.vectors, self.texts)
        elif kind.lower() != FLAT:
            self.candidates = ANNIndex.made(kind, self.vectors, self.texts)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def width(self) -> int:
        """q."""
        return self.vectors.shape[1]

    @property
    def kind(self) -> str:
        """'flat', or FAISS's factory string of the candidates."""
        return self.candidates.kind if self.candidates else self._kind or FLAT

    @property
    def exact(self) -> bool:
        """Whether every row is looked at."""
        return self.candidates is None

    def vectors_of(self, rows: Sequence[int]) -> np.ndarray:
        """(n, q) vectors of the rows that hits name."""
        return as_float32(self.vectors[list(rows)])

    def finder(self) -> Callable[[str], Item | None]:
        """What finds an image by its id; takes a second or two per million images."""
        return self.items.finder()

    def paths(self) -> pa.ChunkedArray:
        """All paths, as bytes."""
        return self.items.paths()

    def some(self, most: int) -> Iterator[Item]:
        """Up to so many of the images, spread over the index."""
        return (self.items[int(i)] for i in np.linspace(0, len(self) - 1, min(most, len(self))))

    def set_place(self, place: ImageAccess) -> None:
        """Look for the images elsewhere; nothing is written."""
        self.place, self.items = place, self.items.having(place.root, self.items.over)

    def rows(self) -> Iterator[Embedded]:
        """All vectors with their items, in order, some at a time."""
        start = 0
        for items in self.items.slices(CHUNK):
            yield self.vectors[start : start + len(items)], items
            start += len(items)

    def nearest(self, queries: np.ndarray, n: int, passing: Chosen | None = None) -> list[Near]:
        """The n rows nearest to each of (B, q) unit queries, up to the rounding of float32."""
        whole = n >= (len(self) if passing is None else len(passing))
        return [self._at(row, whole) for row in knn(queries, self.vectors, n, passing)]

    def propose(self, queries: np.ndarray, n: int, passing: Chosen | None = None) -> list[Near]:
        """What the candidates take for the n nearest to each of (B, q) unit queries; of a rare filter all are nearest."""
        assert self.candidates is not None
        if passing is not None and passing.rare:
            return self.nearest(queries, n, passing)
        return [self._at(row, False) for row in self.candidates.search(queries, n, passing)]

    def _at(self, positions: np.ndarray, whole: bool) -> Near:
        positions = positions[(positions >= 0) & (positions < len(self))]  # what is damaged proposes others
        item = lambda i: self.items[int(positions[i])]  # noqa: E731
        return Near(positions, np.asarray(self.vectors[positions]), item, whole)

    def filter(self, where: str) -> Chosen:
        """The rows that a filter lets pass; those of the last filters are kept. Raises UserError."""
        return self._chosen(where)

    def _choose(self, where: str) -> Chosen:
        if self.metadata is None:
            raise UserError(NO_TABLE)
        return Chosen(self.metadata.rows(where), len(self))

    def table(self) -> Table | None:
        """The metadata by the paths of the images."""
        return self.metadata.keyed(self.paths()) if self.metadata else None

    # --- on disk ------------------------------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """What index.json says of the index."""
        recalls = (self.candidates.recall, self.candidates.text_recall) if self.candidates else (1.0, 1.0)
        return {
            **super().about(),
            "setting": self.candidates.setting if self.candidates else "",
            "recall_at_10": recalls[0],
            "text_recall_at_10": recalls[1],
            **({"oversample": self.candidates.factor} if self.candidates else {}),
            **({"columns": self.metadata.kinds} if self.metadata else {}),
        }

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """See ImageIndex.save; an index that is there is replaced at once."""
        with replacing(folder, overwrite) as new:
            root = write_rows(new, self.rows(), self.root if self.root.path or self.place.confined else None)
            saved = FaissIndex(
                self.vectors,
                self.items,
                self.fingerprint,
                checkpoint=self.checkpoint,
                candidates=self.candidates,
                texts=self.texts,
                place=replace(self.place, root=root),
                metadata=self.metadata,
            )
            saved._finish(new)

    def _finish(self, folder: Path) -> None:
        """Write what belongs beside the vectors and items of a new folder."""
        if self.metadata:
            self.metadata.write(folder / METADATA)
        if self.candidates:
            halve(folder)
            self.candidates.write(folder / CANDIDATES)
            if len(self.texts):
                self.texts.astype("<f4", copy=False).tofile(folder / TEXTS)
        write_about(folder, self.about(), self.place.own)

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any], place: ImageAccess) -> FaissIndex:
        """The index of a folder whose index.json says `about`. Raises UserError where it is damaged.

        The FAISS file of an index that was not built here is not read: FAISS believes what it says. Every row is looked at.
        """
        files = about["files"].keys()
        if ITEMS not in files or len(files & {VECTORS, ROUNDED}) != 1 or files - FILES:
            raise INDEX.unreadable(folder, "its files are not those of an index")
        check_files(folder, about, full={ITEMS, METADATA} if place.own else ())
        vectors, items = open_rows(folder, about["width"], place.root)  # (N, q)
        metadata = Metadata.open(folder / METADATA) if METADATA in files else None
        if metadata and len(metadata) != len(items):
            raise INDEX.unreadable(folder, f"{METADATA} is of another index")
        if len(items) != about["count"] or (about["kind"] == FLAT) == (CANDIDATES in files):
            raise INDEX.unreadable(folder, "tells of another index than is there")
        index = cls(
            vectors,
            items,
            about["fingerprint"],
            checkpoint=about["checkpoint"],
            place=place,
            kind=about["kind"],
            metadata=metadata,
        )
        if TEXTS in files:
            index.texts = np.fromfile(folder / TEXTS, "<f4")
            if len(index.texts) % index.width:
                raise INDEX.unreadable(folder, f"{TEXTS} is of another index")
            index.texts = index.texts.reshape(-1, index.width)  # (n, q)
        if CANDIDATES in files and place.own:
            index._read(folder, about)
        elif CANDIDATES in files:
            warnings.warn(
                f"{folder}: was not built here, so {CANDIDATES} is not believed and every row is compared; "
                f"if you built it: fromage index trust {folder}",
                stacklevel=4,
            )
        return index

    def _read(self, folder: Path, about: dict[str, Any]) -> None:
        """Read what proposes candidates."""
        recalls = about["recall_at_10"], about.get("text_recall_at_10")
        factor = about.get("oversample", RERANK_FACTOR)  # not said by former versions
        if not isinstance(factor, int) or not 1 <= factor <= 1 << 16:
            raise INDEX.unreadable(folder, f"oversample is {factor!r:.40}")
        self.candidates = ANNIndex.read(folder / CANDIDATES, about["kind"], about["setting"], *recalls, factor)
        if (self.candidates.index.d, self.candidates.index.ntotal) != (self.width, len(self)):
            raise INDEX.unreadable(folder, f"{CANDIDATES} is of another index")

    @classmethod
    def check(cls, kind: str | None, width: int, milvus: str = "") -> None:
        """Raise UserError for a kind that FAISS cannot make for rows of width q; None is any."""
        check_kind(kind, width)

    @classmethod
    def write(cls, out: str | Path, rows: Iterable[Embedded], spec: IndexSpec) -> FaissIndex:
        """Stream unit rows into a folder."""
        check_kind(spec.kind, spec.width)
        with replacing(out, spec.overwrite) as new:
            place = replace(spec.place, root=write_rows(new, rows, spec.place.root))
            vectors, items = open_rows(new, spec.width, place.root)  # (N, q)
            metadata = _joined(items, spec.tables)
            index = cls(
                vectors,
                items,
                spec.fingerprint,
                checkpoint=spec.checkpoint,
                texts=spec.texts,
                place=place,
                metadata=metadata,
            )
            index._prepare(spec.kind or default_kind(len(index)), spec.trained)
            index._finish(new)
        opened = cls.open(out := Path(out).resolve(), INDEX.read(out), replace(place, own=True))  # these files are ours
        opened.set_place(place)
        return opened

    @classmethod
    def drop(cls, about: dict[str, Any]) -> None:
        """Nothing: all of it is in its folder."""

    # --- changing a saved index ---------------------------------------------------------------------------------------

    def change(
        self,
        folder: str | Path,
        gone: pa.Array,
        rows: Iterable[Embedded],
        root: ImageRoot | None = None,
        tables: Sequence[Table] = (),
        replaces_table: bool = False,
    ) -> FaissIndex:
        """The index in this folder without the images at the paths `gone`, and with new rows; what was learnt is kept.

        replaces_table: tables come in place of the metadata that the index has.
        """
        trained = self.learnt(folder)
        if trained and len(gone):
            trained.index.reset()  # forgets the rows, not the training
        kept = without(self.rows(), pa.chunked_array([gone])) if len(gone) else self.rows()
        if self.place.confined:  # what strangers' paths say never makes the folder wider that images are opened in
            root = ImageRoot(self.root.path)
        root = root or (ImageRoot(self.root.path) if self.root.path and not self.root.former else None)
        place = replace(self.place, root=root)
        mine = None if replaces_table else self.table()
        spec = IndexSpec(
            width=self.width,
            fingerprint=self.fingerprint,
            checkpoint=self.checkpoint,
            kind=self.kind,
            trained=trained,
            texts=self.texts,
            overwrite=True,
            place=place,
            tables=[*([mine] if mine else []), *tables],
        )
        return self.write(folder, chain(kept, rows), spec)

    def describe(self, folder: str | Path, tables: Sequence[Table]) -> FaissIndex:
        """The index in this folder with the metadata of tables in place of its own."""
        return self.change(folder, pa.array([], pa.binary()), (), tables=tables, replaces_table=True)

    def learnt(self, folder: str | Path) -> ANNIndex | None:
        """The candidates of the index in this folder, in memory, where they can be changed; None in a flat index."""
        old = self.candidates
        return old and ANNIndex.read(Path(folder) / CANDIDATES, old.kind, old.setting, old.recall, mapped=False)


def _joined(items: ItemTable, tables: Sequence[Table]) -> Metadata | None:
    """The rows of tables for the images of an index. Raises UserError as Joined does."""
    if not tables:
        return None
    joined = Joined(tables)
    metadata = joined.of(items)
    joined.check()
    return metadata
