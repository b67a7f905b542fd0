"""An image index whose rows lie in Milvus: for more images than one machine holds, and for several that search.

The folder holds index.json alone. What it finds, and with which scores, is what an index on disk finds: Milvus names rows
near the query and sends their vectors, and the exact scores of these are computed here. Kind flat is exact, but for two
limits of Milvus: no more than 16,384 images of a query, nor more than as many equal scores in the order of the index.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.io import as_json, write_files
from fromage.retrieval.ann import FLAT, FLAT_UP_TO
from fromage.retrieval.faiss_index import ImageIndex, Near
from fromage.retrieval.index_folder import ABOUT, FORMAT, MILVUS, VERSION, check_replaceable, read_about, replacing, seal
from fromage.retrieval.item_table import Embedded, keep_mask
from fromage.retrieval.milvus_collection import Collection, located


class MilvusIndex(ImageIndex):
    """An index in Milvus. Neither its vectors nor its items are here: ask vectors_of, finder, paths and rows."""

    def __init__(self, collection: Collection, fingerprint: str, checkpoint: str = "") -> None:
        self.collection, self.fingerprint, self.checkpoint = collection, fingerprint, checkpoint
        self.candidates, self.texts = None, np.empty((0, self.width), np.float32)
        self._known = (lambda: None, [])  # see require_model

    @classmethod
    def open(cls, about: dict[str, Any]) -> MilvusIndex:
        """The index that an index.json tells of. Raises UserError where Milvus or the collection is away."""
        where = about[MILVUS]
        collection = Collection(where["uri"], where["collection"], about["width"], about["kind"])
        collection.load()
        return cls(collection, about["fingerprint"], about["checkpoint"])

    def __len__(self) -> int:
        return self.collection.count()

    @property
    def width(self) -> int:
        """q."""
        return self.collection.width

    @property
    def kind(self) -> str:
        """'flat', or a name of Milvus and its numbers."""
        return self.collection.kind

    def vectors_of(self, rows: Sequence[int]) -> np.ndarray:
        """(n, q) vectors of the rows that hits name."""
        return self.collection.at(rows).vectors

    def finder(self) -> Callable[[str], Item | None]:
        """What finds an image by its id (fromage.retrieval.item_table.image_id)."""
        return self.collection.with_id

    def paths(self) -> pa.ChunkedArray:
        """All paths, as bytes."""
        return pa.chunked_array([items.column("path") for _, items in self.rows()], pa.binary())

    def rows(self) -> Iterator[Embedded]:
        """All vectors with their items, in order, some at a time."""
        return self.collection.all()

    def _nearest(self, rows: np.ndarray, n: int) -> list[Near]:
        found = self.collection.near(rows, n) if len(rows) else []
        return [Near(f.rows, f.vectors, f.items.__getitem__, len(f.rows) < n) for f in found]

    _proposed = _nearest

    def about(self) -> dict[str, Any]:
        """What index.json says; count is of the time when it was written."""
        where = {MILVUS: {"uri": self.collection.uri, "collection": self.collection.name}}
        recall = 1.0 if self.kind == FLAT else None  # not measured
        return super().about() | {"setting": "", "recall_at_10": recall} | where

    def finish(self, folder: Path) -> None:
        """Write index.json into a new folder."""
        seal(folder, self.about())

    def save(self, folder: str | Path) -> None:
        """Write index.json: anew into the index's own folder, or into another one for the same collection."""
        check_replaceable(folder)
        about = {"format": FORMAT, "version": VERSION, **self.about(), "files": {}}
        write_files(Path(folder), {ABOUT: as_json(about)})

    def add(self, rows: Iterable[Embedded]) -> None:
        """Put rows behind those that are there, but for images that are there already. A killed run may be repeated."""
        self.collection.insert((fresh for some in rows if len((fresh := self._fresh(*some))[1])), self.collection.end())

    def _fresh(self, vectors: np.ndarray, items: pa.RecordBatch) -> Embedded:
        there = pa.array(list(self.collection.rows_of(items.column("path").to_pylist())), pa.binary())
        keep = keep_mask(items, pa.chunked_array([there]))
        return vectors[keep], items.filter(pa.array(keep))

    def remove(self, rows: Sequence[int]) -> None:
        """Take rows out. Raises UserError if none would be left."""
        if len(rows) == len(self):
            raise UserError("an index needs at least one image; none is left")
        self.collection.delete(rows)


def write(
    out: str | Path, rows: Iterable[Embedded], width: int, fingerprint: str, checkpoint: str, kind: str | None, uri: str
) -> MilvusIndex:
    """Put unit rows into a new collection and name it in the folder out; a collection which that named before is dropped.

    What is killed leaves its collection, named fromage_..., to be dropped by hand.

    Args:
        kind: None is flat for up to a million rows, and beyond what Milvus takes by itself.
        uri: see fromage.retrieval.milvus_collection.
    """
    check_replaceable(out)
    uri = located(uri)
    if Path(out).resolve() in Path(uri).parents:
        raise UserError(f"{uri}: lies in the folder of the index, which is replaced as a whole; name another place")
    collection = Collection.create(uri, fingerprint, width, kind or FLAT)
    try:
        count = collection.insert(rows)
        if not count:
            raise UserError("an index needs at least one image; none was given")
        if kind is None and count > FLAT_UP_TO:
            collection.kind = "autoindex"
        collection.index()
        index, old = MilvusIndex(collection, fingerprint, checkpoint), former(out)
        with replacing(out) as new:
            index.finish(new)
    except BaseException:
        with suppress(UserError):  # the first one counts
            collection.drop()
        raise
    drop(old)
    return index


def former(out: str | Path) -> dict[str, Any] | None:
    """What index.json of a folder says that is to be written; None where there is none."""
    return read_about(Path(out)) if (Path(out) / ABOUT).exists() else None


def drop(about: dict[str, Any] | None) -> None:
    """Drop the collection of an index that has been replaced, if it was in Milvus; warns where that fails."""
    if about and MILVUS in about:
        where = about[MILVUS]
        try:
            Collection(where["uri"], where["collection"], about["width"], about["kind"]).drop()
        except UserError as error:
            warnings.warn(f"the former collection {where['collection']} stays: {error}", stacklevel=3)
