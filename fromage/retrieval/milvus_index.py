"""An image index whose rows lie in Milvus: for more images than one machine holds, and for several that search.

The folder holds index.json alone. What it finds, and with which scores, is what an index on disk finds: Milvus names rows
near the query and sends their vectors, and the exact scores of these are computed here. Kind flat is exact, but for two
limits of Milvus: no more than 16,384 images of a query, nor more than as many equal scores in the order of the index.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.io import as_json, write_files
from fromage.retrieval.ann import FLAT_UP_TO
from fromage.retrieval.base import ImageIndex
from fromage.retrieval.image_root import ImageAccess, ImageRoot
from fromage.retrieval.index_folder import ABOUT, INDEX, MILVUS, about_json, check_replaceable, replacing, write_about
from fromage.retrieval.index_spec import FLAT, IndexSpec
from fromage.retrieval.item_table import Embedded, keep_mask
from fromage.retrieval.metadata import Joined
from fromage.retrieval.milvus_client import absolute_uri, reach
from fromage.retrieval.milvus_collection import Collection
from fromage.retrieval.rerank import Near
from fromage.retrieval.table_file import Table, kind_of
from fromage.retrieval.trust import is_sealed
from fromage.retrieval.where import bound, parse


class MilvusIndex(ImageIndex):
    """An index in Milvus. Neither its vectors nor its items are here: ask vectors_of, finder, paths and rows."""

    backend = "milvus"
    moves_root = False

    def __init__(
        self, collection: Collection, fingerprint: str, checkpoint: str = "", place: ImageAccess | None = None
    ) -> None:
        self.collection = collection
        super().__init__(fingerprint, checkpoint, place=place)
        self.set_place(self.place)

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any], place: ImageAccess) -> MilvusIndex:
        """The index of a folder whose index.json says `about`. Raises UserError where Milvus or the collection is away.

        An index that was not built here may name any address: it is not connected to, and the token is not sent to it.
        """
        where = about.get(MILVUS)
        if not isinstance(where, dict) or not where.keys() >= {"uri", "collection"}:
            raise INDEX.unreadable(folder, "it names no collection")
        if not place.own:
            raise UserError(
                f"{folder}: names Milvus at {where['uri']}, and was not built here; if that address is yours: "
                f"fromage index trust {folder}"
            )
        columns = about.get("columns", {})
        collection = Collection(where["uri"], where["collection"], about["width"], about["kind"], columns)
        collection.load()
        return cls(collection, about["fingerprint"], about["checkpoint"], place)

    def set_place(self, place: ImageAccess) -> None:
        """Look for the images elsewhere; nothing is written."""
        self.place, self.collection.root = place, place.root or ImageRoot()

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

    def filter(self, where: str) -> str:
        """A filter as Milvus writes it."""
        if not self.collection.columns:
            raise UserError("where: the index has no metadata; build it again with --table FILE --key COLUMN")
        return self.collection.expression(bound(parse(where), self.collection.columns))

    def table(self) -> Table | None:
        """The metadata by the paths of the images."""
        return self.collection.metadata() if self.collection.columns else None

    def nearest(self, queries: np.ndarray, n: int, passing: str | None = None) -> list[Near]:
        """The n rows that Milvus finds nearest to each of (B, q) unit queries."""
        found = self.collection.near(queries, n, passing or "") if len(queries) else []  # (n, q) vectors for each of B
        return [Near(f.rows, f.vectors, f.items.__getitem__, len(f.rows) < n) for f in found]

    def about(self) -> dict[str, Any]:
        """What index.json says; count is of the time when it was written."""
        return {
            **super().about(),
            "setting": "",
            "recall_at_10": 1.0 if self.kind == FLAT else None,  # not measured
            **({"columns": self.collection.columns} if self.collection.columns else {}),
            MILVUS: {"uri": self.collection.uri, "collection": self.collection.name},
        }

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write index.json into the index's own folder, or into another one for the same collection."""
        check_replaceable(folder, overwrite)
        write_files(Path(folder), {ABOUT: as_json(about_json(self.about(), {}, self.place.own))})

    def change(
        self,
        folder: str | Path,
        gone: pa.Array,
        rows: Iterable[Embedded],
        root: ImageRoot | None = None,
        tables: Sequence[Table] = (),
    ) -> MilvusIndex:
        """The index in this folder without the images at the paths `gone`, and with new rows; `root` stays as it was.

        Nothing is undone where it is killed: what it has done by then stays done. tables: for the new rows, of columns
        that the collection has.
        """
        if self.root.former:
            raise UserError(f"{folder}: its collection holds absolute paths, as in former versions; build the index again")
        numbers = [row for some in self.collection.rows_of(gone.to_pylist()).values() for row in some]
        fresh = (new for some in rows if len((new := self._fresh(*some, gone))[1]))
        first = next(iter(fresh), None) if len(numbers) == len(self) else None
        if len(numbers) == len(self) and first is None:
            raise UserError("an index needs at least one image; none is left")
        joined = self._joined(numbers, tables)
        self.collection.insert(fresh if first is None else chain([first], fresh), self.collection.end(), joined)
        self.collection.delete(numbers)
        self.save(folder, overwrite=True)
        return self

    def _joined(self, numbers: Sequence[int], tables: Sequence[Table]) -> Joined | None:
        """The metadata of images that come: that of the rows which go, and of tables."""
        mine = [self.collection.metadata(numbers)] if self.collection.columns else []
        if not mine and not tables:
            return None
        joined = Joined([*mine, *tables])
        strange = [field.name for field in joined.schema if self.collection.columns.get(field.name) != kind_of(field)]
        if strange:
            raise UserError(f"its collection has no such column {strange[0]}; build the index again with --table")
        return joined

    def _fresh(self, vectors: np.ndarray, items: pa.RecordBatch, gone: pa.Array) -> Embedded:
        """What of some rows is not there yet, or goes."""
        paths = items.column("path").filter(pc.invert(pc.is_in(items.column("path"), value_set=gone)))
        keep = keep_mask(items, {*self.collection.rows_of(paths.to_pylist())})
        return vectors[keep], items.filter(pa.array(keep))

    def add(
        self, folder: str | Path, rows: Iterable[Embedded], root: ImageRoot | None = None, tables: Sequence[Table] = ()
    ) -> MilvusIndex:
        """The index in this folder with rows put after its own; images that are there already stay as they are."""
        return self.change(folder, pa.array([], pa.binary()), rows, tables=tables)

    def there(self, paths: pa.Array) -> set[bytes]:
        """Which of the paths, as bytes, the index has an image at."""
        return {*self.collection.rows_of(paths.to_pylist())}

    @classmethod
    def check(cls, kind: str | None, width: int, milvus: str = "") -> None:
        """Raise UserError unless there is a Milvus at `milvus` that answers; kinds are checked when one is made."""
        reach(milvus)

    @classmethod
    def write(cls, out: str | Path, rows: Iterable[Embedded], spec: IndexSpec) -> MilvusIndex:
        """Put unit rows into a new collection and name it in the folder out; spec.trained and spec.texts are not used.

        Kind None is flat for up to a million rows, and beyond what Milvus takes by itself; for spec.milvus see
        fromage.retrieval.milvus_client. What is killed leaves its collection, named fromage_..., to be dropped by hand.
        """
        check_replaceable(out, spec.overwrite)
        uri = absolute_uri(spec.milvus)
        if Path(out).resolve() in Path(uri).parents:
            raise UserError(f"{uri}: lies in the folder of the index, which is replaced as a whole; name another place")
        joined = Joined(spec.tables) if spec.tables else None
        columns = {field.name: kind_of(field) for field in joined.schema} if joined else {}
        collection = Collection.create(uri, spec.fingerprint, spec.width, spec.kind or FLAT, columns)
        try:
            collection.root = spec.place.root or ImageRoot()
            _fill(collection, rows, spec.kind, joined)
            index = cls(collection, spec.fingerprint, spec.checkpoint, replace(spec.place, root=collection.root))
            with replacing(out, spec.overwrite) as new:
                write_about(new, index.about(), index.place.own)
        except BaseException:
            with suppress(UserError):  # the first one counts
                collection.drop()
            raise
        return index

    @classmethod
    def drop(cls, about: dict[str, Any]) -> None:
        """Drop the collection of an index that has been replaced; warns where that fails."""
        where = about[MILVUS]
        if not is_sealed(about):  # its address is not the user's word
            warnings.warn(f"the former collection {where['collection']} stays: its index was not built here", stacklevel=3)
            return
        try:
            Collection(where["uri"], where["collection"], about["width"], about["kind"]).drop()
        except UserError as error:
            warnings.warn(f"the former collection {where['collection']} stays: {error}", stacklevel=3)


def _fill(collection: Collection, rows: Iterable[Embedded], kind: str | None, joined: Joined | None) -> None:
    """Put rows into a new collection and make it searchable. Raises UserError where there is no row."""
    count = collection.insert(rows, joined=joined)
    if not count:
        raise UserError("an index needs at least one image; none was given")
    if joined:
        joined.check()
    if kind is None and count > FLAT_UP_TO:
        collection.kind = "autoindex"
    collection.index()
