"""The images of an index as Arrow columns: millions of them open at once from a file that stays on disk.

Paths and captions are bytes here: file names need not be Unicode, and Python's surrogates stand for what is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fromage.data.image_source import Item
from fromage.errors import UserError

SCHEMA = pa.schema([("path", pa.binary()), ("caption", pa.binary())])
Embedded = tuple[np.ndarray, pa.RecordBatch]  # (n, q) rows of the retrieval space, and the items they are of
CHUNK = 1 << 14  # rows


def image_id(path: bytes) -> str:
    """16 hex digits that change with the path; another index with the same image has the same."""
    return hashlib.blake2b(path, digest_size=8).hexdigest()


def to_batch(items: Sequence[Item]) -> pa.RecordBatch:
    """Items as a record batch."""
    columns = [[item[i].encode("utf-8", "surrogateescape") for item in items] for i in range(len(Item._fields))]
    return pa.record_batch([pa.array(column, pa.binary()) for column in columns], schema=SCHEMA)


class ItemTable(Sequence[Item]):
    """Items by position, read when they are asked for."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self.batches = list(batches)
        self.starts = np.cumsum([0, *map(len, self.batches)])  # (batches + 1,)

    @classmethod
    def open(cls, path: Path) -> ItemTable:
        """Map a file of write_items into memory. Raises pyarrow.ArrowInvalid if it is torn."""
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return cls([reader.get_batch(i) for i in range(reader.num_record_batches)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, position: int) -> Item:  # type: ignore[override]
        if not 0 <= position < len(self):
            raise IndexError(position)
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        place = int(position - self.starts[number])
        return Item(*(column[place].as_py().decode("utf-8", "surrogateescape") for column in self.batches[number].columns))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def paths(self) -> pa.ChunkedArray:
        """All paths, as bytes."""
        return pa.chunked_array([batch.column("path") for batch in self.batches], pa.binary())

    def finder(self) -> Callable[[str], Item | None]:
        """What finds an item by the id of its path, the first of several."""
        paths = (path for batch in self.slices(CHUNK) for path in batch.column("path").to_pylist())
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
        return (batch.slice(start, rows) for batch in self.batches for start in range(0, len(batch), rows))


def keep_mask(batch: pa.RecordBatch, barred: pa.ChunkedArray) -> np.ndarray:
    """Which items of a batch are at none of the barred paths: (n,) truth values."""
    return np.asarray(pc.invert(pc.is_in(batch.column("path"), value_set=barred)))


def without(rows: Iterable[Embedded], barred: pa.ChunkedArray) -> Iterator[Embedded]:
    """The rows whose items are at none of the barred paths."""
    for vectors, items in rows:
        keep = keep_mask(items, barred)
        yield vectors[keep], items.filter(pa.array(keep))


def encoded(paths: Iterable[str]) -> list[bytes]:
    """Paths as they stand in the columns."""
    return [path.encode("utf-8", "surrogateescape") for path in paths]


def check_there(folder: str | Path, paths: Iterable[bytes], there: Collection[bytes]) -> None:
    """Raise UserError for the first path that an index has no image of; folder: of the index."""
    if gone := [path for path in paths if path not in there]:
        name = gone[0].decode("utf-8", "replace")
        raise UserError(f"{folder}: has no image {name}; give paths as `fromage search` prints them")


def write_items(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Write an Arrow file that ItemTable.open maps."""
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
