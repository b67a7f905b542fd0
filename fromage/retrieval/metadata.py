"""Metadata of an index's images: columns of a table, a row for each image, which searches can be filtered by.

They lie beside the items in an Arrow file that is mapped into memory (fromage.retrieval.index_folder). Filters are those of
fromage.retrieval.where; pyarrow's compute functions carry them out.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fromage.errors import UserError
from fromage.images.locators import key_of, name_of
from fromage.io import json_object
from fromage.retrieval.image_root import to_bytes, to_text
from fromage.retrieval.item_table import ItemTable, open_arrow, write_arrow
from fromage.retrieval.table_file import KEPT, Table, as_keys, in_calendar, kind_of
from fromage.retrieval.where import KINDS, Both, Comparison, Condition, bound, parse

CHUNK = 1 << 16  # rows
NO_TABLE = "where: the index has no metadata; give it a table: fromage index describe INDEX --table FILE --key COLUMN"
COMPARE = {"=": pc.equal, "!=": pc.not_equal, "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}


class Metadata:
    """Columns with a row for each image. table: N rows, of the types in KEPT."""

    def __init__(self, table: pa.Table) -> None:
        self.table, self.kinds = table, {field.name: kind_of(field) for field in table.schema}

    @classmethod
    def open(cls, path: Path) -> Metadata:
        """Map what write wrote into memory. Raises UserError for what is damaged or holds other types."""
        batches, schema = open_arrow(path, lambda schema: {*schema.types} <= {*KEPT})
        if len({*schema.names}) < len(schema.names):
            raise UserError(f"{path}: has two columns of one name; build the index again")
        return cls(pa.Table.from_batches(batches, schema))

    def write(self, path: Path) -> None:
        """Write a file that open maps."""
        write_arrow(path, self.table.schema, self.table.to_batches(CHUNK))

    def __len__(self) -> int:
        return self.table.num_rows

    def keyed(self, paths: pa.ChunkedArray) -> Table:
        """The rows that say anything, by the paths (N) of their images."""
        said = reduce(pc.or_, (pc.is_valid(column) for column in self.table.columns)).combine_chunks()
        return Table(as_keys(paths.filter(said)), self.table.filter(said))

    def over(self, meta: str, row: int) -> str:
        """The metadata of an image, JSON, with its row of the table over it."""
        columns = zip(self.table.column_names, self.table.slice(row, 1).columns, strict=True)
        values = {name: in_calendar(column)[0].as_py() for name, column in columns}
        return merged(meta, {name: value for name, value in values.items() if value is not None}, self.kinds)

    def rows(self, where: str) -> np.ndarray:
        """(n,) rows of the images that a filter lets pass, rising. Raises UserError for a filter that does not fit."""
        condition = bound(parse(where), self.kinds)
        masks = [self._holds(condition, batch) for batch in self.table.to_batches(CHUNK)]
        return np.flatnonzero(np.concatenate(masks)) if masks else np.empty(0, np.int64)

    def _holds(self, condition: Condition, batch: pa.RecordBatch) -> np.ndarray:
        """(n,) truth values of a condition for the rows of a batch."""
        if isinstance(condition, Both):
            join = np.logical_and if condition.every else np.logical_or
            return reduce(join, (self._holds(part, batch) for part in condition.parts))
        column = batch.column(condition.column)
        found = pc.fill_null(_test(condition, column), False)
        return found.to_numpy(zero_copy_only=False)


def _test(test: Comparison, column: pa.Array) -> pa.Array:
    """Truth values of a test, null where the column has none."""
    if test.op in ("is null", "is not null"):
        return pc.is_null(column) if test.op == "is null" else pc.is_valid(column)
    if pa.types.is_date32(column.type):
        column = column.cast(pa.timestamp("us"))
    if "like" in test.op:
        found = pc.match_like(column, test.values[0])
    elif "in" in test.op:
        found = pc.is_in(column, value_set=pa.array(test.values, column.type))
        found = pc.if_else(pc.is_valid(column), found, None)
    else:
        return COMPARE[test.op](column, pa.scalar(test.values[0], column.type))
    return pc.invert(found) if test.op.startswith("not") else found


def merged(meta: str, row: dict[str, Any], kinds: Mapping[str, str]) -> str:
    """An image's metadata, JSON, with the values of a row over it."""
    if not row:
        return meta
    for name in row:
        if kinds[name] == "json":
            with suppress(ValueError, RecursionError):
                row[name] = json.loads(row[name])
    return json.dumps(json_object(meta) | row, default=lambda value: value.isoformat())


class Joined:
    """Tables, joined to images: of several tables with an image the first counts.

    Attributes:
        schema: of all columns.
    """

    def __init__(self, tables: Sequence[Table]) -> None:
        """Raises UserError for columns that hold different things."""
        self.tables, self.schema = tables, _schema(tables)
        columns = [[_column(table, field) for table in tables] for field in self.schema]
        self._whole = [pa.chunked_array([c for each in every for c in each.chunks], every[0].type) for every in columns]
        self._first, self._seen, self._lost = "", 0, 0

    def of(self, items: ItemTable) -> Metadata:
        """The rows for some images."""
        row, end = np.full(len(items), -1, np.int64), 0  # (N,) into all tables, one after the other
        for table in self.tables:
            found = _rows(items, table)  # (N,)
            row = np.where((row < 0) & (found >= 0), found + end, row)
            end += len(table.keys)
        self._seen, self._lost = self._seen + len(items), self._lost + int((row < 0).sum())
        self._first = self._first or items[0].path
        wanted = pa.array(np.maximum(row, 0), mask=row < 0)
        return Metadata(pa.table([column.take(wanted) for column in self._whole], schema=self.schema).combine_chunks())

    def check(self) -> None:
        """Warn of images that are in no table of a user's. Raises UserError where none of them is."""
        given = [table for table in self.tables if table.whose]
        if given and self._lost == self._seen:
            key = given[0].keys[0].as_py().decode()[:80]
            raise UserError(
                f"{given[0].whose}: names no image of the index: its first key is {key!r}, "
                f"the first image {self._first!r}; give paths, file names, or keys within shards"
            )
        if given and self._lost:
            warnings.warn(f"{self._lost:,} of {self._seen:,} images are in no row of the table", stacklevel=2)


def _column(table: Table, field: pa.Field) -> pa.ChunkedArray:
    """A column of a table, without values where it has none."""
    if field.name in table.columns.column_names:
        return table.columns.column(field.name).cast(field.type)
    return pa.chunked_array([pa.nulls(len(table.keys), field.type)])


def _schema(tables: Sequence[Table]) -> pa.Schema:
    """The columns of all tables."""
    fields: dict[str, pa.Field] = {}
    for field in (field for table in tables for field in table.columns.schema):
        known = fields.setdefault(field.name, field)
        if {kind_of(known), kind_of(field)} == {"int64", "double"}:
            fields[field.name] = pa.field(field.name, pa.float64())
        elif kind_of(known) != kind_of(field):
            held = KINDS[kind_of(known)], KINDS[kind_of(field)]
            raise UserError(f"{field.name} holds {held[0]} in one table and {held[1]} in another; name them apart")
    return pa.schema([*fields.values()])


def _rows(items: ItemTable, table: Table) -> np.ndarray:
    """(N,) rows of a table for the items, -1 for none: by the way of naming images that finds the most."""
    best = _found(items.paths(), table.keys)
    for way in WAYS if table.whose else ():
        if (best >= 0).all():
            break
        found = _found(way(items), table.keys)
        best = found if (found >= 0).sum() > (best >= 0).sum() else best
    return best


def _found(names: pa.ChunkedArray, keys: pa.Array) -> np.ndarray:
    found = pc.index_in(names.cast(pa.large_binary()), value_set=keys.cast(pa.large_binary()))
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)


def _named(name: Callable[[str], str]) -> Callable[[ItemTable], pa.ChunkedArray]:
    def way(items: ItemTable) -> pa.ChunkedArray:
        named = ([to_bytes(name(to_text(path))) for path in chunk.to_pylist()] for chunk in items.paths().chunks)
        return pa.chunked_array([pa.array(names, pa.binary()) for names in named], pa.binary())

    return way


def _stored(items: ItemTable) -> pa.ChunkedArray:
    return pa.chunked_array([batch.column("path") for batch in items.batches], pa.binary())


WAYS: Iterable[Callable[[ItemTable], pa.ChunkedArray]] = (
    _stored,  # within the folder of the images
    _named(name_of),
    _named(key_of),
)
