"""Embeddings on disk, between embedding and indexing: a folder of Parquet files, and embeddings.json beside them.

    embeddings.json   the model (fingerprint, checkpoint), the source they are of, and in how many parts it comes
    00000.parquet     a part: key, path, caption, meta and stamp (strings), embedding (list of q float16 or float32); a row
                      per image

A part gets its name when it is whole, so that a run which was killed goes on where it was. Each file repeats the model's
fingerprint in its schema's metadata, names the images that were left out and the files that it was made of, and seals its
paths (fromage.retrieval.trust). A source that has grown is gone on with: parts whose files are as they were stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fromage.data.image_source import ImageSource, Item, Names, is_absolute
from fromage.data.shards import UNREAD
from fromage.errors import UserError, reason
from fromage.identity import FolderKind
from fromage.images.locators import MEMBER, split_locator
from fromage.io import WholeFile, as_json, write_files
from fromage.retrieval import trust
from fromage.retrieval.image_root import to_bytes, to_text
from fromage.retrieval.index_folder import check_paths
from fromage.retrieval.item_table import SCHEMA, Embedded, filled, to_batch

ABOUT, FORMAT, VERSION = "embeddings.json", "fromage-embeddings", 1
DTYPES = ("float32", "float16")
MOST_PARTS = 1_000_000
STORE = FolderKind(
    ABOUT,
    "embeddings",
    of="run",
    again="make some with: fromage index embed",
    format=(FORMAT, VERSION),
    keys=frozenset({"fingerprint", "checkpoint", "source", "width", "dtype", "parts"}),
    ignored=frozenset({"checkpoint", "root"}),  # paths, which may change
)
GROWS = frozenset({"source", "parts"})  # keys that change as a source grows
PATHS = "embeddings' paths"  # what a seal is for


class EmbeddingStore:
    """A folder of embeddings. about: what embeddings.json says."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, about

    @classmethod
    def begin(cls, folder: str | Path, **about: Any) -> EmbeddingStore:
        """Start a store, or take up one of the same model, source and dtype. Raises UserError if another is there.

        about: fingerprint and checkpoint of the model, digest and root of the source, width q, dtype, number of parts.
        """
        return cls(Path(folder), STORE.begin(Path(folder), about))

    @classmethod
    def begin_for(cls, folder: str | Path, images: ImageSource, **about: Any) -> tuple[EmbeddingStore, ImageSource]:
        """As begin, for a source, which may have grown since; returns with the store what of the source is to be embedded.

        Parts whose files are no longer there, or have changed, are embedded again without these. Raises UserError as begin
        does; shards of which none is here already are another source, in the same folder too.
        """
        folder = Path(folder)
        about |= {"source": images.digest(), "root": images.root, "parts": len(images.parts)}
        there = replace(STORE, ignored=STORE.ignored | GROWS).find(folder, about)
        if there is not None:
            store = cls(folder, there)
            if (parts := store._take_up(images)) is not None:
                return store, images.only(parts, store.missing(), images.count)
        store = cls.begin(folder, **about)
        return store, images.only(images.parts, store.missing(), images.count)

    def _take_up(self, images: ImageSource) -> list[Names] | None:
        """The parts with which a source goes on that is not as it was; None for another source, of which nothing is here."""
        same = self.about["source"] == images.digest()
        now = {name: images.stamp(name) for part in images.parts for name in part}
        planned = images.parts if same else []
        made = {part: self._made_of(part, planned[part] if part < len(planned) else ()) for part in self._parts()}
        if not same and not images.goes_on(self.about.get("root"), {name for names in made.values() for name in names}):
            return None
        later = {UNREAD} if self.missing() else set()  # stamps of what is read again when all else is there
        stale = {
            part
            for part, names in made.items()
            if any(n not in now or (s and s != now[n] and s not in later) for n, s in names.items())
        }
        if images.captions is not None:
            stale |= {part for part in made.keys() - stale if not self._has_captions(part, images.captions)}
        whole = same and not stale and self.about["parts"] == len(images.parts)
        if whole and all(tuple(names) == images.parts[part] for part, names in made.items()):
            return images.parts
        kept = {part: names for part, names in made.items() if part not in stale}
        done = {name for names in kept.values() for name in names}
        left = images.parts_of([name for name in now if name not in done])
        count = max(len(kept) + len(left), max(kept, default=-1) + 1)
        free = [part for part in range(count) if part not in kept]
        left += [()] * (len(free) - len(left))  # where parts have gone
        parts = {part: tuple(names) for part, names in kept.items()} | dict(zip(free, left, strict=True))
        self.about |= {"source": images.digest(), "root": images.root, "parts": count}
        for path in self._files() - {self._path(part) for part in kept}:
            path.unlink()  # first: a kill after the other step would leave them to be taken for parts of the new source
        write_files(self.folder, {ABOUT: as_json(self.about)})
        return [parts[part] for part in range(count)]

    def _has_captions(self, part: int, captions: Mapping[str, str]) -> bool:
        """Whether the rows of a part have these captions, by path, and no others."""
        for batch in self._read(part, ["path", "caption"]):
            pairs = zip(*(batch.column(name).cast(pa.binary()).to_pylist() for name in ("path", "caption")), strict=True)
            if any(to_bytes(captions.get(to_text(path), "")) != caption for path, caption in pairs):
                return False
        return True

    def _made_of(self, part: int, planned: Names) -> dict[str, str]:
        """The files or shards that a part was made of, with their stamps; of parts of former versions those of its rows.

        planned: those of a part of a former version that has no rows.
        """
        file = self._open(part)
        said = (file.schema_arrow.metadata or {}).get(b"names")
        names: dict[str, str] = json.loads(said or b"{}")
        if not file.metadata.num_rows:
            return dict.fromkeys(planned, "") if said is None else names
        if names and all(map(is_absolute, names)):
            return names
        batches = (batch.column("path").cast(pa.binary()).to_pylist() for batch in self._read(part, ["path"]))
        files = dict.fromkeys(split_locator(to_text(path))[0] for paths in batches for path in paths)
        return dict.fromkeys(files, next(iter(names.values()), "") if len(names) == 1 else "")

    @classmethod
    def open(cls, folder: str | Path) -> EmbeddingStore:
        """The store in a folder. Raises UserError if there is none that can be read."""
        about = STORE.read(Path(folder))
        kinds = {"parts": int, "width": int, "fingerprint": str, "dtype": str}
        odd = next((name for name, kind in kinds.items() if type(about.get(name)) is not kind), None)
        if odd or not 0 <= about["parts"] <= MOST_PARTS or about["width"] < 1:
            raise STORE.unreadable(Path(folder), f"its {odd or 'parts or width'} cannot be")
        check_paths(STORE, Path(folder), about)
        return cls(Path(folder), about)

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:05d}.parquet"

    def _files(self) -> set[Path]:
        """The files of parts, also of more than there should be."""
        found = (path for path in self.folder.glob("*.parquet") if path.stem.isdecimal())
        return {path for path in found if path == self._path(int(path.stem))}

    def discard(self) -> None:
        """Remove the store; what else lies in its folder stays."""
        for path in (*self._files(), self.folder / ABOUT):
            path.unlink(missing_ok=True)

    def missing(self) -> list[int]:
        """Parts that are still to be embedded."""
        return [part for part in range(self.about["parts"]) if not self._path(part).exists()]

    def write(
        self,
        part: int,
        rows: np.ndarray,
        items: Sequence[Item],
        broken: Sequence[str],
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Add a part: (n, q) rows and their items; broken says what was left out, a line each.

        names: of the files or shards that it was made of, with their stamps; one that no stamp of a file equals has it
        embedded again.
        """
        values = pa.array(rows.astype(self.about["dtype"], copy=False).ravel())  # (n q)
        batch = to_batch(items)
        named, *_ = to_batch([Item(_key(item.path)) for item in items])
        texts = [column.cast(pa.string(), safe=False) for column in (named, *batch.columns)]  # safe: only Unicode
        table = pa.table(
            [*texts, pa.FixedSizeListArray.from_arrays(values, self.about["width"])],
            names=["key", *SCHEMA.names, "embedding"],
            metadata={
                "fingerprint": self.about["fingerprint"],
                "broken": json.dumps(list(broken)),
                "names": json.dumps(dict(names)),
                "seal": trust.seal(PATHS, b"\0".join(batch.column("path").to_pylist())),
            },
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
            fingerprint = metadata[b"fingerprint"].decode()
            if lacking := {"path", "embedding"} - {*file.schema_arrow.names}:
                raise ValueError(f"no column {min(lacking)}")
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{path}: is damaged ({reason(error)}); remove it and embed again") from error
        if fingerprint != self.about["fingerprint"]:
            raise UserError(f"{path}: was embedded by another model than {self.folder / ABOUT} says; remove one of them")
        return file

    def _parts(self) -> list[int]:
        left = set(self.missing())
        return [part for part in range(self.about["parts"]) if part not in left]

    def __len__(self) -> int:
        """Embeddings that are there."""
        return sum(self._open(part).metadata.num_rows for part in self._parts())

    def is_own(self) -> bool:
        """Whether all paths are as they were written on this machine. Raises UserError as batches does."""
        return all(map(self._is_own, self._every()))

    def _is_own(self, part: int) -> bool:
        paths = [path for batch in self._read(part, ["path"]) for path in batch.column("path").cast(pa.binary()).to_pylist()]
        said = (self._open(part).schema_arrow.metadata or {}).get(b"seal", b"")
        return trust.holds(said.decode("ascii", "replace"), PATHS, b"\0".join(paths))

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
            raise UserError(f"{self._path(part)}: is damaged ({reason(error)}); remove it and embed again") from error

    def _rows(self, batch: pa.RecordBatch) -> Embedded:
        column = batch.column("embedding")
        if column.null_count or getattr(column.type, "list_size", None) != self.about["width"]:
            raise UserError(f"{self.folder}: its rows are not all {self.about['width']} wide; embed again")
        values = column.flatten().to_numpy(zero_copy_only=False)  # (n q)
        texts = [(name, batch.column(name).cast(pa.binary())) for name in SCHEMA.names if name in batch.schema.names]
        items = filled(pa.record_batch([column for _, column in texts], names=[name for name, _ in texts]))
        return values.reshape(len(batch), self.about["width"]).astype(np.float32), items


def _key(path: str) -> str:
    """What the column `key` says of an image: the key in its shard, after the last of several '.tar#'; else the stem."""
    _, is_member, key = path.rpartition(MEMBER)
    return key if is_member else Path(path).stem
