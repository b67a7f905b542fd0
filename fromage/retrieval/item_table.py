"""The images of an index as Arrow columns: millions of them open at once from a file that stays on disk.

Paths and captions are bytes here: file names need not be Unicode, and Python's surrogates stand for what is not.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from fromage.data.image_source import Item
from fromage.errors import UserError, first_line
from fromage.retrieval.image_root import ImageRoot, to_bytes, to_text

SCHEMA = pa.schema([(name, pa.binary()) for name in Item._fields])
LEAST = {"path", "caption"}  # columns of every table; those of former versions have no others
Embedded = tuple[np.ndarray, pa.RecordBatch]  # (n, q) rows of the retrieval space, and the items they are of
START = 8  # bytes of an Arrow file in front of its stream


def image_id(path: bytes) -> str:
    """16 hex digits that change with the path; another index with the same image has the same."""
    return hashlib.blake2b(path, digest_size=8).hexdigest()


def to_batch(items: Sequence[Item]) -> pa.RecordBatch:
    """Items as a record batch."""
    columns = [[to_bytes(item[i]) for item in items] for i in range(len(Item._fields))]
    return pa.record_batch([pa.array(column, pa.binary()) for column in columns], schema=SCHEMA)


class ItemTable(Sequence[Item]):
    """Items by position, read when they are asked for; never changed.

    Attributes:
        root: what the paths of the batches are relative to.
        over: (metadata of an item, its position) -> its metadata with what a table says of it, where there is one.
    """

    def __init__(
        self,
        batches: Sequence[pa.RecordBatch],
        root: ImageRoot | None = None,
        over: Callable[[str, int], str] | None = None,
    ) -> None:
        self.batches, self.root, self.over = list(batches), root or ImageRoot(), over
        self.starts = np.cumsum([0, *map(len, self.batches)])  # (batches + 1,)

    @classmethod
    def open(cls, path: Path, root: ImageRoot | None = None) -> ItemTable:
        """Map a file of write_items into memory. Raises UserError as open_arrow does."""
        fits = lambda schema: LEAST <= {*schema.names} <= {*SCHEMA.names} and {*schema.types} == {pa.binary()}  # noqa: E731
        batches, _ = open_arrow(path, fits)
        if any(column.null_count for batch in batches for column in batch.columns):
            raise UserError(f"{path}: is damaged (an entry is missing); build the index again")
        return cls([filled(batch) for batch in batches], root)

    def having(self, root: ImageRoot | None, over: Callable[[str, int], str] | None) -> ItemTable:
        """A table over the same batches; root and over as of the class."""
        return ItemTable(self.batches, root, over)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, position: int) -> Item:  # type: ignore[override]
        if not 0 <= position < len(self):
            raise IndexError(position)
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        place = int(position - self.starts[number])
        path, *others = (column[place].as_py() for column in self.batches[number].columns)
        item = Item(*map(to_text, (self.root.locate(path), *others)))
        return item._replace(meta=self.over(item.meta, position)) if self.over else item

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def paths(self) -> pa.ChunkedArray:
        """All paths, as bytes."""
        return pa.chunked_array([self.root.located(batch.column("path")) for batch in self.batches], pa.binary())

    def finder(self) -> Callable[[str], Item | None]:
        """What finds an item by the id of its path as it is stored, the first of several."""
        paths = (path for batch in self.batches for path in batch.column("path").to_pylist())
        digests = np.fromiter((int(image_id(path), 16) for path in paths), np.uint64)  # (N,)
        rows = np.argsort(digests, kind="stable")  # (N,)
        digests = digests[rows]  # (N,), rising

        def find(name: str) -> Item | None:
            wanted = np.uint64(int(name, 16))
            place = int(np.searchsorted(digests, wanted))
            return self[int(rows[place])] if place < len(rows) and digests[place] == wanted else None

        return find

    def slices(self, rows: int) -> Iterator[pa.RecordBatch]:
        """All items, in order, at most so many at a time."""
        for batch in self.batches:
            for start in range(0, len(batch), rows):
                yield with_paths(batch.slice(start, rows), self.root.located)


def with_paths(batch: pa.RecordBatch, changed: Callable[[pa.Array], pa.Array]) -> pa.RecordBatch:
    """Items with other paths."""
    return pa.record_batch([changed(batch.column("path")), *batch.columns[1:]], schema=SCHEMA)


def filled(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Items with empty texts in the columns that a former version did not have."""
    empty = pa.repeat(pa.scalar(b""), len(batch))
    return pa.record_batch([batch.column(n) if n in batch.schema.names else empty for n in SCHEMA.names], schema=SCHEMA)


def keep_mask(batch: pa.RecordBatch, barred: Set[bytes]) -> np.ndarray:
    """Which items of a batch are at none of the barred paths: (n,) truth values."""
    return np.array([path not in barred for path in batch.column("path").to_pylist()], bool)


def without(rows: Iterable[Embedded], barred: pa.ChunkedArray) -> Iterator[Embedded]:
    """The rows whose items are at none of the barred paths."""
    paths = {path for chunk in barred.chunks for path in chunk.to_pylist()}  # Arrow would hash them anew for each batch
    for vectors, items in rows:
        keep = keep_mask(items, paths)  # (n,)
        yield vectors[keep], items.filter(pa.array(keep))


def check_there(folder: str | Path, paths: Iterable[bytes], there: Collection[bytes]) -> None:
    """Raise UserError for the first path that an index has no image of; folder: of the index."""
    if gone := [path for path in paths if path not in there]:
        name = gone[0].decode("utf-8", "replace")
        raise UserError(f"{folder}: has no image {name}; give paths as `fromage search` prints them")


def _check_plain(file: pa.NativeFile) -> None:
    """Raise ValueError for compressed buffers, which write_items does not make: they claim any size, which is allocated.

    The metadata of each batch is read as Arrow's format has it: a flatbuffer Message, in it the RecordBatch with field 3 for
    the compression.
    """
    file.seek(START)
    pa.ipc.read_message(file)  # the schema
    with suppress(EOFError):
        while True:
            data = pa.ipc.read_message(file).metadata.to_pybytes()
            if _field(data, _field_at(data, struct.unpack_from("<I", data)[0], 2), 3):
                raise ValueError("its buffers are compressed")


def _field(data: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table is, relative to the table; 0 where it is not set."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    size = struct.unpack_from("<H", data, vtable)[0]
    return struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0] if 4 + 2 * number < size else 0


def _field_at(data: bytes, table: int, number: int) -> int:
    """The table that a field of a flatbuffer's table names."""
    at = table + _field(data, table, number)
    return at + struct.unpack_from("<I", data, at)[0]


def write_items(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Write an Arrow file that ItemTable.open maps."""
    write_arrow(path, SCHEMA, batches)


def write_arrow(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write an Arrow file that open_arrow maps."""
    with pa.ipc.new_file(str(path), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def open_arrow(path: Path, fits: Callable[[pa.Schema], bool]) -> tuple[list[pa.RecordBatch], pa.Schema]:
    """Map a file of write_arrow into memory. fits: whether a schema is as it should be.

    Raises UserError for what is no such file, for an offset beyond its buffer, and for texts that are not Unicode.
    """
    try:
        file = pa.memory_map(str(path))
        _check_plain(file)
        file.seek(START)
        reader = pa.ipc.open_stream(file)  # a file is a stream and then an index of it, which is not believed
        if not fits(reader.schema):
            raise ValueError(f"columns {reader.schema.names} are not those of an index")
        batches = list(reader)
        for batch in batches:
            batch.validate(full=True)
        return batches, reader.schema
    except (OSError, EOFError, ValueError, MemoryError, struct.error, pa.ArrowException) as error:
        raise UserError(f"{path}: is damaged ({first_line(error)}); build the index again") from error
