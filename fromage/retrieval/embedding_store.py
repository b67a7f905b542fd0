"""Embeddings on disk, between embedding and indexing: a folder of Parquet files, and embeddings.json beside them.

    embeddings.json   the model (fingerprint, checkpoint), the source they are of, and in how many parts it comes
    00000.parquet     a part: key, path and caption (strings), embedding (list of q float16 or float32); a row per image

A part gets its name when it is whole, so that a run which was killed goes on where it was. Each file repeats the model's
fingerprint in its schema's metadata, and names the images that were left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fromage.data.image_source import Item
from fromage.errors import UserError, first_line
from fromage.identity import FolderKind
from fromage.io import WholeFile
from fromage.retrieval.item_table import SCHEMA, Embedded, to_batch

ABOUT, FORMAT, VERSION = "embeddings.json", "fromage-embeddings", 1
DTYPES = ("float32", "float16")
STORE = FolderKind(
    ABOUT,
    "embeddings",
    of="run",
    again="make some with: fromage index embed",
    format=(FORMAT, VERSION),
    keys=frozenset({"fingerprint", "checkpoint", "source", "width", "dtype", "parts"}),
    ignored=frozenset({"checkpoint"}),  # a path, which may change
)


class EmbeddingStore:
    """A folder of embeddings. about: what embeddings.json says."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, about

    @classmethod
    def begin(cls, folder: str | Path, **about: Any) -> EmbeddingStore:
        """Start a store, or take up one of the same model, source and dtype. Raises UserError if another is there.

        about: fingerprint and checkpoint of the model, digest of the source, width q, dtype, number of parts.
        """
        return cls(Path(folder), STORE.begin(Path(folder), about))

    @classmethod
    def open(cls, folder: str | Path) -> EmbeddingStore:
        """The store in a folder. Raises UserError if there is none that can be read."""
        return cls(Path(folder), STORE.read(Path(folder)))

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:05d}.parquet"

    def missing(self) -> list[int]:
        """Parts that are still to be embedded."""
        return [part for part in range(self.about["parts"]) if not self._path(part).exists()]

    def write(self, part: int, rows: np.ndarray, items: Sequence[Item], broken: Sequence[str]) -> None:
        """Add a part: (n, q) rows and their items; broken says what was left out, a line each."""
        values = pa.array(rows.astype(self.about["dtype"], copy=False).ravel())  # (n q)
        keys = [item.path.rpartition(".tar#")[2] if ".tar#" in item.path else Path(item.path).stem for item in items]
        paths, captions = (column.cast(pa.string(), safe=False) for column in to_batch(items))  # safe: only Unicode
        named, _ = (column.cast(pa.string(), safe=False) for column in to_batch([Item(key) for key in keys]))
        table = pa.table(
            [named, paths, captions, pa.FixedSizeListArray.from_arrays(values, self.about["width"])],
            names=["key", "path", "caption", "embedding"],
            metadata={"fingerprint": self.about["fingerprint"], "broken": json.dumps(list(broken))},
        )
        path = self._path(part)
        with WholeFile(path, kept="parts that are finished are kept, and the same command goes on") as file:
            pq.write_table(table, file)

    def _open(self, part: int) -> pq.ParquetFile:
        path = self._path(part)
        try:
            file = pq.ParquetFile(path, memory_map=True)
            metadata = file.schema_arrow.metadata or {}
            json.loads(metadata[b"broken"])
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{path}: is damaged ({first_line(error)}); remove it and embed again") from error
        if metadata[b"fingerprint"].decode() != self.about["fingerprint"]:
            raise UserError(f"{path}: was embedded by another model than {self.folder / ABOUT} says; remove one of them")
        return file

    def _parts(self) -> list[int]:
        left = set(self.missing())
        return [part for part in range(self.about["parts"]) if part not in left]

    def __len__(self) -> int:
        """Embeddings that are there."""
        return sum(self._open(part).metadata.num_rows for part in self._parts())

    def broken(self) -> list[str]:
        """What was left out of the parts that are there, and why."""
        return [line for part in self._parts() for line in json.loads(self._open(part).schema_arrow.metadata[b"broken"])]

    def captions(self) -> pa.ChunkedArray:
        """All captions that say anything, as bytes. Raises UserError as batches does."""
        batches = [batch for part in self._every() for batch in self._read(part, ["caption"])]
        said = pa.chunked_array([batch.column("caption").cast(pa.binary()) for batch in batches], pa.binary())
        return said.filter(pc.greater(pc.binary_length(said), 0))

    def batches(self) -> Iterator[Embedded]:
        """All parts in order: (n, q) float32 and items. Raises UserError unless every part is there and whole."""
        for part in self._every():
            yield from map(self._rows, self._read(part))

    def _every(self) -> range:
        """All parts, which must be there."""
        if left := self.missing():
            whole = f"{self.about['parts'] - len(left)} of {self.about['parts']} parts are embedded"
            raise UserError(f"{self.folder}: {whole}; run `fromage index embed` again to finish")
        return range(self.about["parts"])

    def _read(self, part: int, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        file = self._open(part)
        try:
            yield from file.iter_batches(columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self._path(part)}: is damaged ({first_line(error)}); remove it and embed again") from error

    def _rows(self, batch: pa.RecordBatch) -> Embedded:
        values = batch.column("embedding").flatten().to_numpy(zero_copy_only=False)  # (n q)
        items = [batch.column(name).cast(pa.binary()) for name in SCHEMA.names]
        return values.reshape(len(batch), self.about["width"]).astype(np.float32), pa.record_batch(items, schema=SCHEMA)
