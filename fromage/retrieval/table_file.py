"""A user's table, Parquet or JSONL, as columns of the few types that an index keeps.

Kept are true and false, whole numbers (int64), numbers (double, without NaN), texts, dates and times (UTC, in microseconds).
Lists and objects are kept as JSON, marked in the column's field; bytes are refused.
"""

from __future__ import annotations

import io
import json
from datetime import date
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj
import pyarrow.parquet as pq

from fromage.errors import UserError, first_line
from fromage.io import decode_text

JSON = {b"holds": b"json"}  # of a field
TIME = pa.timestamp("us")
FIRST_DAY, LAST_DAY = (day.toordinal() - date(1970, 1, 1).toordinal() for day in (date.min, date.max))  # since 1970
MOST_BLOCK = (1 << 31) - 1  # bytes; pyarrow counts them in 32 bits
DEEP = 100  # brackets in a line of JSON, up to which it is not looked at more closely
KEPT = (pa.bool_(), pa.int64(), pa.float64(), pa.string(), TIME, pa.date32())


def kind_of(field: pa.Field) -> str:
    """What a column holds, a key of fromage.retrieval.where.KINDS."""
    return "json" if (field.metadata or {}).get(b"holds") == b"json" else str(field.type)


def field_of(name: str, kind: str) -> pa.Field:
    """The column of a name that holds a kind."""
    types = {str(type_): type_ for type_ in KEPT}
    return pa.field(name, pa.string(), metadata=JSON) if kind == "json" else pa.field(name, types[kind])


class Table(NamedTuple):
    """Columns for images.

    Attributes:
        keys: as bytes, what names the image of each row; large_binary, of which an array holds more than 2 GiB.
        columns: of the types in KEPT.
        whose: a file for messages; '' of an index, whose keys are paths.
    """

    keys: pa.Array
    columns: pa.Table
    whose: str = ""


def read_table(path: str | Path, key: str) -> Table:
    """The rows of a Parquet file, of a folder of such, or of a JSONL file.

    key: the column that names images; it is not kept, since it may hold paths, which no server gives away. Raises UserError
    where the table cannot be read, has no such column or no other, or has a key twice.
    """
    path = Path(path)
    table = _read(path)
    if key not in table.column_names:
        raise UserError(f"{path}: has no column {key}; --key is one of {', '.join(table.column_names[:12])}")
    if table.num_columns == 1:
        raise UserError(f"{path}: has no column beside {key}; give it what is to be known of the images")
    table = table.filter(pc.is_valid(table.column(key)))
    columns = kept_columns(path, table.drop_columns([key]))
    keys = as_keys(_kept(path, key, table.column(key))[1].cast(pa.string()))
    if len(pc.unique(keys)) < len(keys):
        counts = pc.value_counts(keys)
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))[0].as_py()
        raise UserError(f"{path}: {key} is {twice.decode()[:60]!r} in several rows; it must name an image once")
    return Table(keys, columns, str(path))


def as_keys(names: pa.ChunkedArray) -> pa.Array:
    """Texts or bytes as the keys of a table."""
    return names.cast(pa.large_binary()).combine_chunks()


def kept_columns(path: Path, table: pa.Table) -> pa.Table:
    """The columns of a table as the types that are kept. Raises UserError for others; path: of the table, for messages."""
    if len({*table.column_names}) < table.num_columns:
        raise UserError(f"{path}: has two columns of one name; name them apart")
    fields = [_kept(path, name, table.column(name)) for name in table.column_names]
    return pa.table([column for _, column in fields], schema=pa.schema([field for field, _ in fields]))


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            data = decode_text(path.read_bytes(), path).encode()
            _check_depth(path, data)
            table = pj.read_json(io.BytesIO(data), pj.ReadOptions(block_size=min(max(1 << 16, len(data) + 1), MOST_BLOCK)))
        else:
            table = pq.read_table(path)
        table.validate(full=True)
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as a table ({first_line(error)}); give Parquet or .jsonl") from error
    if not table.num_rows:
        raise UserError(f"{path}: holds no row; give a row for each image")
    return table


def _check_depth(path: Path, data: bytes) -> None:
    """Raise UserError for lines of JSON that are nested so deep that pyarrow's reader would end the process."""
    depth = 0  # of what lines before have left open
    for number, line in enumerate(data.split(b"\n"), 1):
        opened = line.count(b"[") + line.count(b"{")
        if depth + opened > DEEP:
            try:
                json.loads(line)  # brackets within texts count for nothing
                continue
            except (RecursionError, ValueError):
                raise UserError(f"{path}: line {number} is nested too deep; give plain columns") from None
        depth = max(0, depth + opened - line.count(b"]") - line.count(b"}"))


def in_calendar(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Times and dates, null outside of the years 1 to 9999, which Python cannot show."""
    kind = column.type
    if pa.types.is_timestamp(kind) and kind.unit != "ns":  # nanoseconds end in 2262
        numbers, a_day = column.cast(pa.int64()), 86400 * {"s": 1, "ms": 10**3, "us": 10**6}[kind.unit]
    elif pa.types.is_date(kind):
        small = pa.types.is_date32(kind)
        numbers, a_day = column.cast(pa.int32() if small else pa.int64()).cast(pa.int64()), 1 if small else 86_400_000
    else:
        return column
    within = pc.and_(pc.greater_equal(numbers, FIRST_DAY * a_day), pc.less(numbers, (LAST_DAY + 1) * a_day))
    return pc.if_else(within, column, pa.scalar(None, kind))


def _kept(path: Path, name: str, column: pa.ChunkedArray) -> tuple[pa.Field, pa.ChunkedArray]:
    """A column as one of the types that are kept."""
    column, kind = in_calendar(column), column.type
    if pa.types.is_dictionary(kind):
        return _kept(path, name, column.cast(kind.value_type))
    try:
        if pa.types.is_nested(kind):
            texts = (None if value is None else json.dumps(value, default=str) for value in column.to_pylist())
            return pa.field(name, pa.string(), metadata=JSON), pa.chunked_array([pa.array(texts, pa.string())])
        if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            column = column.cast(pa.float64())
            return pa.field(name, pa.float64()), pc.if_else(pc.is_nan(column), None, column)
        if pa.types.is_timestamp(kind):
            return pa.field(name, TIME), column.cast(pa.timestamp("us", kind.tz), safe=False).cast(TIME)
        if pa.types.is_integer(kind):
            large = kind == pa.uint64() and (pc.max(column).as_py() or 0) >= 1 << 63
            to = pa.float64() if large else pa.int64()
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
            raise UserError(f"{path}: {name} holds bytes; leave that column out of the table")
        else:
            to = pa.bool_() if pa.types.is_boolean(kind) else pa.date32() if pa.types.is_date(kind) else pa.string()
        return pa.field(name, to), column.cast(to, safe=to != pa.float64())
    except (pa.ArrowException, OverflowError, ValueError) as error:
        raise UserError(f"{path}: {name} holds {kind}, which is not kept ({first_line(error)}); leave it out") from error
