import json
from datetime import date, datetime
from decimal import Decimal
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fromage.errors import UserError
from fromage.retrieval import table_file
from fromage.retrieval.table_file import field_of, kind_of, read_table


def test_columns_of_parquet_become_few_types(tmp_path):
    table = pa.table(
        {
            "file": ["a", "b"],
            "small": pa.array([1, None], pa.int8()),
            "large": pa.array([1, 2**64 - 1], pa.uint64()),
            "real": pa.array([float("nan"), 0.5], pa.float32()),
            "money": pa.array([Decimal("1.50"), None]),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
            "when": pa.array([datetime(2019, 5, 1, 12), None], pa.timestamp("ns", "Europe/Rome")),
            "day": pa.array([date(2019, 5, 1), None], pa.date64()),
            "tags": pa.array([["a", "é"], None]),
            "box": [{"x": 1, "t": datetime(2019, 1, 1)}, None],
            "none": pa.nulls(2),
            "yes": [True, None],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    keys, columns, whose = read_table(tmp_path / "t.parquet", "file")
    assert keys.to_pylist() == [b"a", b"b"] and whose.endswith("t.parquet")
    kinds = {field.name: kind_of(field) for field in columns.schema}
    assert kinds == {
        "small": "int64", "large": "double", "real": "double", "money": "double", "kind": "string",
        "when": "timestamp[us]", "day": "date32[day]", "tags": "json", "box": "json", "none": "string", "yes": "bool",
    }  # fmt: skip
    first, second = columns.to_pylist()
    assert first["when"] == datetime(2019, 5, 1, 12) and first["real"] is None and second["real"] == 0.5
    assert json.loads(first["tags"]) == ["a", "é"] and json.loads(first["box"]) == {"x": 1, "t": "2019-01-01 00:00:00"}
    assert columns.schema.equals(pa.schema([field_of(name, kind) for name, kind in kinds.items()]), check_metadata=True)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_jsonl_of_any_encoding(tmp_path, encoding):
    lines = [{"id": 7, "place": "Zürich", "n": 1}, {"id": 8, "more": [1]}, {"n": 3}, {"id": 9, "place": "x" * 3_000_000}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding)
    keys, columns, _ = read_table(tmp_path / "t.jsonl", "id")
    assert keys.to_pylist() == [b"7", b"8", b"9"], "rows without a key are left out"
    assert columns.column("place")[0].as_py() == "Zürich" and len(columns.column("place")[2].as_py()) == 3_000_000


def test_a_folder_of_parquet_files_is_one_table(tmp_path):
    for i in range(2):
        pq.write_table(pa.table({"key": [f"{i}"], "n": [i]}), tmp_path / f"metadata_{i}.parquet")
    assert read_table(tmp_path, "key").keys.to_pylist() == [b"0", b"1"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"id": 1, "n": 1}\n{"id": 1}', "id is '1' in several rows"),
        (b'{"id": 1}', "has no column beside id"),
        (b'{"x": 1}', "has no column id; --key is one of x"),
        (b'{"id": 1', "cannot be read as a table"),
        (b"[1, 2]", "cannot be read as a table"),
        (b'{"id": "a", "n": 1}\n{"id": "b", "n": "x"}', "cannot be read as a table"),
        (b"", "cannot be read as a table"),
        (b"\xff\xfe\xff", "t.jsonl"),
        (b'{"id": "\xff"}', "t.jsonl"),
    ],
)
def test_what_is_no_table_is_said_in_one_line(tmp_path, content, told):
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_table(tmp_path / "t.jsonl", "id")
    assert told in str(error.value) and "\n" not in str(error.value)


def test_parquet_that_is_none_and_bytes_are_refused(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="cannot be read as a table"):
        read_table(tmp_path / "t.parquet", "id")
    pq.write_table(pa.table({"id": ["a"], "jpg": [b"\xff"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="jpg holds bytes; leave that column out"):
        read_table(tmp_path / "t.parquet", "id")


@pytest.mark.parametrize(
    "kind", [pa.timestamp("s"), pa.timestamp("ms", "UTC"), pa.timestamp("us"), pa.date32(), pa.date64()]
)
def test_times_that_no_calendar_has_are_null(tmp_path, kind):
    day = {"s": 86400, "ms": 86_400_000, "us": 86_400_000_000}.get(getattr(kind, "unit", ""), 1)
    day = 86_400_000 if kind == pa.date64() else day
    days = [-719162, 0, 2932896, -719163, 2932897, 60_000_000]  # 1 January 1, 1970, 31 December 9999, and what is beyond
    stored = pa.array([number * day for number in days], pa.int32() if kind == pa.date32() else pa.int64()).cast(kind)
    pq.write_table(pa.table({"id": list("abcdef"), "at": stored}), tmp_path / "t.parquet")
    years = [each and each.year for each in read_table(tmp_path / "t.parquet", "id").columns.column("at").to_pylist()]
    assert years == [1, 1970, 9999, None, None, None]


def test_json_that_is_nested_too_deep_does_not_end_the_process(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"id": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(UserError, match="line 1 is nested too deep"):
        read_table(tmp_path / "t.jsonl", "id")
    (tmp_path / "t.jsonl").write_text('{"id": "a", "x": ' + "[\n" * 200_000)
    with pytest.raises(UserError, match="line 100 is nested too deep"):
        read_table(tmp_path / "t.jsonl", "id")
    (tmp_path / "t.jsonl").write_text('{"id": "a", "x": "' + "[" * 1000 + '"}\n')
    assert read_table(tmp_path / "t.jsonl", "id").columns.column("x").to_pylist() == ["[" * 1000]


class Large(bytes):
    """Bytes that say they are 2 GiB."""

    def __len__(self):
        return 1 << 31


def test_json_lines_of_2_gib_are_read_and_what_overflows_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "t.jsonl").write_text('{"id": "a", "x": 1}\n{"id": "b", "x": 2}\n')
    monkeypatch.setattr(table_file, "decode_text", lambda data, name: SimpleNamespace(encode=lambda: Large(data)))
    assert read_table(tmp_path / "t.jsonl", "id").columns.column("x").to_pylist() == [1, 2]
    monkeypatch.setattr(table_file, "MOST_BLOCK", 1 << 31)
    with pytest.raises(UserError, match=r"cannot be read as a table .*give Parquet"):
        read_table(tmp_path / "t.jsonl", "id")
