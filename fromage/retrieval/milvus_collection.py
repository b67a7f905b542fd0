"""A collection of Milvus that holds the rows of an image index, and nothing else of the program.

    row        whole number, the primary key; rises in the order of the index, with gaps where images were removed
    picture    image_id of the path, as a signed number: what is looked up without quoting a path
    path, caption, meta, stamp   as in fromage.retrieval.item_table; former versions have no meta and no stamp
    c0, c1 ... the columns of the metadata, in the order of index.json; times as microseconds, lists and objects as JSON
    embedding  q float32 at unit length, searched by inner product

Where it is: see fromage.retrieval.milvus_client.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, timedelta
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.retrieval.image_root import ImageRoot, to_bytes, to_text
from fromage.retrieval.item_table import SCHEMA, Embedded, ItemTable, image_id, to_batch
from fromage.retrieval.metadata import Joined, Metadata, merged
from fromage.retrieval.milvus_client import LITE, SECONDS, asking, connect
from fromage.retrieval.table_file import Table, field_of
from fromage.retrieval.where import Both, Condition

if TYPE_CHECKING:
    from pymilvus import MilvusClient

ID = "picture"  # the field of image_id: its name in collections that were written before it was called so
CHUNK = 1 << 10  # rows sent at once
MOST = 1 << 14  # rows that Milvus gives at once
TEXT = (1 << 16) - 1  # bytes of a text that Milvus takes; longer captions are cut
ODD = {0xDC80 + i: 0xF780 + i for i in range(128)}  # Python's stand-ins for bytes that are no Unicode, to private characters
PLAIN = {there: here for here, there in ODD.items()}
NONE: Mapping[str, str] = MappingProxyType({})
EPOCH = datetime(1970, 1, 1)  # UTC, as all times here


class Found(NamedTuple):
    """Rows of the collection: numbers (n,), vectors (n, q), images."""

    rows: np.ndarray
    vectors: np.ndarray
    items: list[Item]


class Collection:
    """A collection.

    Attributes:
        uri: path of a .db, or address.
        name: of the collection.
        kind: of its index, see parse_kind.
        root: what its paths are relative to.
        texts: names of the texts that it has of each image.
        columns: of the metadata: what each holds, a key of fromage.retrieval.where.KINDS.
    """

    def __init__(self, uri: str, name: str, width: int, kind: str, columns: Mapping[str, str] = NONE) -> None:
        self.uri, self.name, self.width, self.kind, self.columns = uri, name, width, kind, dict(columns)
        self.root, self.texts = ImageRoot(), SCHEMA.names
        self.fields = {column: f"c{i}" for i, column in enumerate(self.columns)}

    @classmethod
    def create(cls, uri: str, fingerprint: str, width: int, kind: str, columns: Mapping[str, str] = NONE) -> Collection:
        """A new, empty collection, its name drawn at random. uri: located. Raises UserError where Milvus is away."""
        parse_kind(kind)
        if uri.endswith(LITE):
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
        collection = cls(uri, f"fromage_{fingerprint}_{uuid.uuid4().hex[:8]}", width, kind, columns)
        client = collection.client  # first: it says what to install
        from pymilvus import DataType

        schema = client.create_schema(auto_id=False)
        schema.add_field("row", DataType.INT64, is_primary=True)
        schema.add_field(ID, DataType.INT64)
        for name in SCHEMA.names:
            schema.add_field(name, DataType.VARCHAR, max_length=TEXT)
        types = {"bool": DataType.BOOL, "double": DataType.DOUBLE} | dict.fromkeys(["string", "json"], DataType.VARCHAR)
        for column, name in collection.fields.items():
            kept = types.get(columns[column], DataType.INT64)
            schema.add_field(name, kept, nullable=True, **({"max_length": TEXT} if kept == DataType.VARCHAR else {}))
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=width)
        with asking(uri):
            client.create_collection(collection.name, schema=schema, consistency_level="Strong", timeout=SECONDS)
        return collection

    @cached_property
    def client(self) -> MilvusClient:
        """The connection. Raises UserError where there is none."""
        return connect(self.uri)

    def load(self) -> None:
        """Make an existing collection ready to be searched. Raises UserError where it is gone or of another width."""
        gone = self.uri.endswith(LITE) and not Path(self.uri).exists()  # which opening it would make
        client = None if gone else self.client
        with asking(self.uri):
            if client is None or not client.has_collection(self.name, timeout=SECONDS):
                raise UserError(f"Milvus at {self.uri}: has no collection {self.name} any more; build the index again")
            fields = {f["name"]: f["params"] for f in client.describe_collection(self.name, timeout=SECONDS)["fields"]}
            if fields.get("embedding", {}).get("dim") != self.width:
                raise UserError(f"Milvus at {self.uri}: {self.name} is not the collection of this index; build it again")
            self.texts = [name for name in SCHEMA.names if name in fields]
            client.load_collection(self.name)

    def insert(self, rows: Iterable[Embedded], first: int = 0, joined: Joined | None = None) -> int:
        """Put (n, q) unit rows and their items in, numbered from first on; returns the number after the last.

        joined: their metadata.
        """
        for vectors, batch in rows:
            for start in range(0, len(batch), CHUNK):
                items = _items(some := batch.slice(start, CHUNK))
                told = (joined.of(ItemTable([some])).table.to_pylist() if joined else []) or [{}] * len(items)
                data = [self._entity(first + i, item, vectors[start + i], told[i]) for i, item in enumerate(items)]
                with asking(self.uri):
                    self.client.insert(self.name, data, timeout=SECONDS)
                first += len(items)
        return first

    def index(self) -> None:
        """Make what was inserted into a new collection searchable: Milvus builds behind, and till then looks at every row.

        Raises UserError for a kind that this Milvus has not.
        """
        name, params = parse_kind(self.kind)
        asked = self.client.prepare_index_params()
        asked.add_index("embedding", index_type=name, metric_type="IP", params=params)
        asked.add_index(ID, index_type="INVERTED")
        with asking(self.uri):
            self.client.flush(self.name)
            self.client.create_index(self.name, asked, sync=False)
            self.client.load_collection(self.name)

    def drop(self) -> None:
        """Remove the collection from Milvus."""
        with asking(self.uri):
            self.client.drop_collection(self.name, timeout=SECONDS)

    def count(self) -> int:
        """Rows."""
        return self._query("", ["count(*)"])[0]["count(*)"]

    def near(self, queries: np.ndarray, n: int, which: str = "") -> list[Found]:
        """The n rows that Milvus finds nearest to each of (B, q); fewer where there are not as many, and MOST at most.

        which: Milvus's expression for the rows among which it looks; '' for all.
        """
        with asking(self.uri):
            found = self.client.search(
                self.name,
                data=list(queries),
                anns_field="embedding",
                limit=min(n, MOST),
                search_params={"metric_type": "IP"},
                filter=which,
                output_fields=["row", *self.texts, *self.fields.values(), "embedding"],
                timeout=SECONDS,
            )
        return [self._found([hit["entity"] for hit in hits]) for hits in found]

    def at(self, rows: Sequence[int]) -> Found:
        """The rows of these numbers, in their order."""
        entities = {e["row"]: e for e in self._query(f"row in {list(map(int, rows))}")} if len(rows) else {}
        if gone := [row for row in rows if row not in entities]:
            raise UserError(f"Milvus: row {gone[0]} was removed meanwhile; search again")
        return self._found([entities[row] for row in rows])

    def with_id(self, name: str) -> Item | None:
        """The image of an id, the first of several."""
        found = self._query(f"{ID} in [{_signed(name)}]", ["row", *self.texts, *self.fields.values()])
        return self._item(min(found, key=lambda entity: entity["row"])) if found else None

    def rows_of(self, paths: Sequence[bytes]) -> dict[bytes, list[int]]:
        """The rows at each of the paths that are there."""
        found: dict[bytes, list[int]] = {}
        for start in range(0, len(paths), CHUNK):
            some = set(paths[start : start + CHUNK])
            ids = [_signed(image_id(self.root.store(path))) for path in some]
            for entity in self._query(f"{ID} in {ids}", ["row", "path"]):
                path = self.root.locate(to_bytes(_plain(entity["path"])))
                if path in some:  # and not another one of the same id
                    found.setdefault(path, []).append(entity["row"])
        return found

    def delete(self, rows: Sequence[int]) -> None:
        """Remove rows."""
        for start in range(0, len(rows), CHUNK):
            with asking(self.uri):
                self.client.delete(self.name, filter=f"row in {rows[start : start + CHUNK]}", timeout=SECONDS)

    def end(self) -> int:
        """The number after the last row: found by halving, since Milvus knows no largest."""
        low, high = 0, 1  # all rows are below high, where the first loop ends
        while self._query(f"row >= {high}", ["row"], limit=1):
            low, high = high, 2 * high
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._query(f"row >= {middle}", ["row"], limit=1) else (low, middle)
        return low

    def all(self) -> Iterator[Embedded]:
        """All rows with their items, in order, some at a time."""
        for start in range(0, self.end(), CHUNK):
            some = self._query(f"row >= {start} and row < {start + CHUNK}")
            found = self._found(sorted(some, key=lambda entity: entity["row"]), told=False)
            yield found.vectors, to_batch(found.items)

    def metadata(self, rows: Sequence[int] | None = None) -> Table:
        """The metadata of some rows or all, by the paths of their images."""
        starts, wanted = range(0, self.end() if rows is None else len(rows), CHUNK), ["path", *self.fields.values()]
        which = (
            f"row >= {start} and row < {start + CHUNK}" if rows is None else f"row in {list(rows[start : start + CHUNK])}"
            for start in starts
        )
        entities = [entity for some in which for entity in self._query(some, wanted)]
        paths = [self.root.locate(to_bytes(_plain(entity["path"]))) for entity in entities]
        schema = pa.schema([field_of(name, kind) for name, kind in self.columns.items()])
        values = [self._told(entity) for entity in entities]
        return Metadata(pa.Table.from_pylist(values, schema)).keyed(pa.chunked_array([paths], pa.binary()))

    def expression(self, condition: Condition) -> str:
        """A filter as Milvus writes it; nothing of it is a user's words, but for texts, which are quoted."""
        if isinstance(condition, Both):
            return f"({(' and ' if condition.every else ' or ').join(map(self.expression, condition.parts))})"
        name, op, values = self.fields[condition.column], condition.op, [*map(_literal, condition.values)]
        if op.endswith("null"):
            return f"{name} {op}"
        value = f"[{', '.join(values)}]" if op.endswith("in") else values[0]
        test = f"not ({name} like {value})" if op == "not like" else f"{name} {'==' if op == '=' else op} {value}"
        return f"({name} is not null and {test})"

    def _told(self, entity: dict[str, Any]) -> dict[str, Any]:
        """The metadata of an entity, of the columns that have a value."""
        values = {column: entity.get(name) for column, name in self.fields.items()}
        return {column: _read(value, self.columns[column]) for column, value in values.items() if value is not None}

    def _found(self, entities: Sequence[dict[str, Any]], told: bool = True) -> Found:
        rows = np.array([entity["row"] for entity in entities], np.int64)  # (n,)
        vectors = np.array([entity["embedding"] for entity in entities], np.float32).reshape(len(rows), self.width)
        return Found(rows, vectors, [self._item(entity, told) for entity in entities])

    def _entity(self, row: int, item: Item, vector: np.ndarray, told: dict[str, Any]) -> dict[str, Any]:
        path = self.root.store(to_bytes(item.path))
        texts = item._replace(path=to_text(path))._asdict()
        for name in ("caption", "meta", "stamp"):
            texts[name] = texts[name].translate(ODD).encode()[:TEXT].decode(errors="ignore")
        texts["path"] = texts["path"].translate(ODD)
        own = {name: texts[name] for name in self.texts} | {n: _stored(told.get(c)) for c, n in self.fields.items()}
        return {"row": row, ID: _signed(image_id(path)), **own, "embedding": vector}

    def _item(self, entity: dict[str, Any], told: bool = True) -> Item:
        """The image of an entity; told: with the metadata of the table."""
        path, *others = (_plain(entity.get(name, "")) for name in SCHEMA.names)
        item = Item(self.root.path_of(path), *others)
        return item._replace(meta=merged(item.meta, self._told(entity), self.columns)) if told and self.fields else item

    def _query(self, which: str, fields: Sequence[str] | None = None, **more: Any) -> list[Any]:
        wanted = ["row", *self.texts, *self.fields.values(), "embedding"] if fields is None else list(fields)
        with asking(self.uri):
            return list(self.client.query(self.name, filter=which, output_fields=wanted, timeout=SECONDS, **more))


def parse_kind(kind: str) -> tuple[str, dict[str, int]]:
    """'flat' or 'HNSW,M=32,efConstruction=200' -> Milvus's name of an index, and its numbers."""
    name, *numbers = kind.split(",")
    try:
        pairs = [number.split("=") for number in numbers]
        return name.upper(), {key: int(value) for key, value in pairs}
    except ValueError as error:
        raise UserError(f"kind {kind}: write a name and numbers that Milvus knows, such as HNSW,M=32") from error


def _stored(value: Any) -> Any:
    """A value of the metadata as Milvus keeps it."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace")[:TEXT].decode(errors="ignore")
    if isinstance(value, date):
        time = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day)
        return (time - EPOCH) // timedelta(microseconds=1)
    return value


def _read(value: Any, kind: str) -> Any:
    """The other way round."""
    time = EPOCH + timedelta(microseconds=value) if kind.startswith(("date", "time")) else None
    return value if time is None else time.date() if kind.startswith("date") else time


def _literal(value: Any) -> str:
    """A value in an expression of Milvus."""
    return json.dumps(_stored(value), ensure_ascii=False)


def _items(batch: Any) -> list[Item]:
    columns = [batch.column(name).to_pylist() for name in SCHEMA.names]
    return [Item(*map(to_text, texts)) for texts in zip(*columns, strict=True)]


def _plain(text: str) -> str:
    return text.translate(PLAIN)


def _signed(name: str) -> int:
    """16 hex digits as a number of 64 bits with a sign."""
    value = int(name, 16)
    return value - (1 << 64) if value >> 63 else value
