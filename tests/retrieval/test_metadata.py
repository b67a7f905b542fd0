"""Metadata of an index: joined by key, kept through every change, and searched within."""

import json
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_build import store
from test_faiss_index import items, rows

from fromage.cli.main import main
from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.retrieval import chosen
from fromage.retrieval.build import add, build, describe, merge, remove, write_index
from fromage.retrieval.faiss_index import FaissIndex
from fromage.retrieval.index_spec import IndexSpec
from fromage.retrieval.item_table import SCHEMA, ItemTable, to_batch
from fromage.retrieval.metadata import Joined, Metadata
from fromage.retrieval.open_index import load_index
from fromage.retrieval.rerank import unit
from fromage.retrieval.table_file import Table, read_table

N = 3000
KINDS = ["flat", "IVF16,SQ8", "HNSW16", "SQ8", "PCA16,IVF8,SQ8", "IVF16,PQ8x4fs", "PQ8x4fs"]


def table_of(names, **columns):
    made = pa.table({"file": list(names), **columns})
    return Table(made.column("file").combine_chunks().cast(pa.binary()), made, "the table")


@pytest.fixture(scope="module")
def described():
    """A table for N images: year rises, one in ten is in Rome."""
    years = pa.array([2000 + i // 100 for i in range(N)])
    return table_of((f"{i}.jpg" for i in range(N)), year=years, place=["Rome" if i % 10 == 3 else "Paris" for i in range(N)])


def written(folder, tables, kind="flat", n=N, q=16, **how):
    return write_index(
        folder, [(unit(rows(n, q), ""), to_batch(items(n)))], IndexSpec(q, "f00d", kind=kind, tables=tables, **how)
    )


@pytest.fixture(scope="module", params=KINDS)
def index(request, described, tmp_path_factory):
    return written(tmp_path_factory.mktemp("described") / "index", [described], request.param)


FILTERS = {"year >= 2015": lambda i: i >= 1500, "place = 'Rome'": lambda i: i % 10 == 3, "year = 2029": lambda i: i >= 2900}


@pytest.mark.parametrize("rare", [0, 1 << 14])
@pytest.mark.parametrize("where", FILTERS)
def test_a_filtered_search_finds_the_nearest_of_what_passes(index, where, rare, monkeypatch):
    monkeypatch.setattr(chosen, "RARE", rare)  # 0: FAISS's selectors at any number of rows
    index._chosen.cache_clear()
    passing, queries = np.flatnonzero([FILTERS[where](i) for i in range(N)]), unit(rows(20, 16, seed=1), "")
    true = passing[(queries @ unit(rows(N, 16), "")[passing].T).argsort(1)[:, :-11:-1]]  # (20, 10)
    found = [[int(hit.path.removesuffix(".jpg")) for hit in hits] for hits in index.search(queries, 10, where=where)]
    assert all(len(each) == 10 and {*each} <= {*passing.tolist()} for each in found)
    share = np.mean([len({*a} & {*b}) / 10 for a, b in zip(found, true.tolist(), strict=True)])
    assert share == 1 if index.kind == "flat" else share >= (0.97 if rare else 0.9)


def test_exclusion_order_and_all_that_follows_hold_within_a_filter(index):
    query, where = rows(1, 16, seed=2), "year = 2007"
    best = index.search(query, 3, where=where)[0]
    assert [hit.path for hit in index.search(query, 2, best[0].path, where)[0]] == [hit.path for hit in best[1:]]
    everything = [hit.path for hit in index.beyond(query[0], best, where=where)]
    assert sorted(everything) == sorted(f"{i}.jpg" for i in range(700, 800)) and everything[:3] == [hit.path for hit in best]
    assert index.search(query, 5, where="year > 3000") == [[]] and len(index.search(query, 500, where=where)[0]) == 100
    assert best[0].metadata["year"] == 2007 and best[0].metadata.keys() == {"file", "year", "place"}


def test_what_an_index_cannot_be_filtered_by_is_said(index, tmp_path):
    with pytest.raises(UserError, match="no column yeer; the index has file, year, place"):
        index.search(rows(1, 16), 1, where="yeer = 1")
    with pytest.raises(UserError, match=r"no metadata; give it a table: fromage index describe INDEX"):
        FaissIndex.build(rows(3), items(3), "").search(rows(1), 1, where="year = 1")


def test_metadata_follow_their_images_through_every_change(tmp_path):
    names = [f"/p/{i}.jpg" for i in range(10)]
    things = [Item(name, meta='{"n": 1, "own": "x"}' if i == 3 else "") for i, name in enumerate(names)]
    known = table_of([f"{i}.jpg" for i in range(4)], n=range(4), day=[date(2019, 1, i + 1) for i in range(4)])
    with pytest.warns(UserWarning, match="1 of 5 images are in no row"):
        build(store(tmp_path / "a", rows(10)[:5], things[:5]), tmp_path / "index", tables=[known])
    said = lambda index: {item.path: json.loads(item.meta or "{}").get("n") for item in index.items}  # noqa: E731
    assert said(load_index(tmp_path / "index")) == dict(zip(names, [0, 1, 2, 3, None], strict=False))
    assert json.loads(load_index(tmp_path / "index").items[3].meta) == {
        "n": 3, "own": "x", "file": "3.jpg", "day": "2019-01-04"
    }  # fmt: skip

    more = table_of(["/p/0.jpg", "/p/5.jpg", "/p/4.jpg"], n=[9.5, 5.5, 4.5], place=["x", "y", "z"])
    with pytest.warns(UserWarning, match="4 of 10 images are in no row"):
        added = add(tmp_path / "index", store(tmp_path / "b", rows(10)[5:], things[5:]), [more])
    assert said(added) == dict(zip(names, [0, 1, 2, 3, 4.5, 5.5, None, None, None, None], strict=True))
    assert [hit.path for hit in added.search(rows(1), 9, where="place is not null or n = 0")[0]]
    removed = remove(tmp_path / "index", names[1:3])
    assert said(removed) == {k: v for k, v in said(added).items() if k not in names[1:3]}
    removed.save(tmp_path / "copy")
    assert said(load_index(tmp_path / "copy")) == said(removed)

    build(store(tmp_path / "c", rows(2), [Item("/q/1.jpg"), Item("/p/9.jpg")]), tmp_path / "other")
    both = merge([tmp_path / "index", tmp_path / "other"], tmp_path / "both", "IVF1,Flat")
    assert said(both) == said(removed) | {"/q/1.jpg": None}
    new = describe(tmp_path / "both", [table_of(["/q/1.jpg", "/p/0.jpg"], m=[1, 2])])
    assert new.metadata.kinds == {"file": "string", "m": "int64"} and len(new) == 9
    assert {hit.path for hit in new.search(rows(1), 9, where="m in (1, 2)")[0]} == {"/q/1.jpg", "/p/0.jpg"}


@pytest.mark.parametrize(
    ("paths", "keys"),
    [
        (["/p/a/1.jpg", "/p/b/1.jpg", "/p/b/2.jpg"], ["/p/a/1.jpg", "/p/b/1.jpg", "/p/b/2.jpg"]),
        (["/p/a/1.jpg", "/p/b/1.jpg", "/p/b/2.jpg"], ["a/1.jpg", "b/1.jpg", "b/2.jpg"]),
        (["/p/a/1.jpg", "/p/b/2.jpg", "/p/b/3.jpg"], ["1.jpg", "2.jpg", "3.jpg"]),
        (["/p/a/1.jpg", "/p/b/2.jpg", "/p/b/3.jpg"], ["1", "2", "3"]),
        (["/s/0.tar#000", "/s/0.tar#001", "/s/1.tar#002"], ["000", "001", "002"]),
        (["https://x.y/a.jpg?1", "https://x.y/b.jpg", "/c.jpg"], ["https://x.y/a.jpg?1", "https://x.y/b.jpg", "/c.jpg"]),
        (["/p/caf\udce9.jpg", "/p/é.jpg", "/p/\u2028.jpg"], ["caf\\xe9.jpg", "é.jpg", "\u2028.jpg"]),
    ],
)  # fmt: skip
def test_keys_are_paths_names_or_keys_within_shards(tmp_path, paths, keys):
    order = [2, 0, 1]
    known = table_of([keys[i] for i in order], n=order)
    if "\\" in keys[0]:  # no Unicode: no table can say it
        known = table_of([keys[i] for i in order[:1] + order[2:]], n=order[:1] + order[2:])
    index = write_index(
        tmp_path / "i", [(unit(rows(3), ""), to_batch([Item(p) for p in paths]))], IndexSpec(4, "f", tables=[known])
    )  # fmt: skip
    assert index.metadata.table.column("n").to_pylist() == [0 if "\\" not in keys[0] else None, 1, 2]


def test_tables_that_do_not_fit_are_refused_before_anything_is_replaced(tmp_path):
    written(tmp_path / "index", [], n=9)
    before = (tmp_path / "index" / "index.json").read_bytes()
    with pytest.raises(
        UserError, match=r"the table: names no image of the index: its first key is 'x', the first image '0.jpg'"
    ):
        describe(tmp_path / "index", [table_of("xyz", n=range(3))])
    with pytest.raises(UserError, match="n holds texts in one table and whole numbers in another"):
        tables = [table_of(["1.jpg"], n=["a"]), table_of(["2.jpg"], n=[1])]
        describe(tmp_path / "index", tables)
    assert (tmp_path / "index" / "index.json").read_bytes() == before


def test_an_open_index_keeps_its_metadata_where_others_are_refused(tmp_path, described):
    opened = written(tmp_path / "index", [described], n=9)
    with pytest.raises(UserError, match="names no image of the index"):
        opened.describe(tmp_path / "index", [table_of("xyz", n=range(3))])
    assert [hit.path for hit in opened.search(rows(1, 16), 9, where="place = 'Rome'")[0]] == ["3.jpg"]
    assert '"year": 2000' in opened.items[0].meta


def test_a_stranger_s_columns_are_looked_at_before_they_are_believed(tmp_path, described):
    written(tmp_path / "index", [described])
    good = load_index(tmp_path / "index").metadata.table
    bad = {
        "rows": good.slice(1),
        "types": good.append_column("x", pa.array([b"x"] * N)),
        "twice": pa.table([good.column(0)] * 2, names=["a", "a"]),
    }
    for name, table in bad.items():
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        if name == "rows":
            assert len(Metadata.open(tmp_path / name)) == N - 1
        else:
            with pytest.raises(UserError, match="columns"):
                Metadata.open(tmp_path / name)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(str(tmp_path / "small"), good.schema, options=options) as writer:
        writer.write_table(good)
    with pytest.raises(UserError, match="compressed"):
        Metadata.open(tmp_path / "small")
    data = bytearray((tmp_path / "index" / "metadata.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "index" / "metadata.arrow").write_bytes(data)
    with pytest.raises(UserError, match=r"metadata.arrow: is missing or damaged"):
        load_index(tmp_path / "index")


def test_the_command_line(tmp_path, capsys, described):
    build(store(tmp_path / "store", rows(20), items(20)), tmp_path / "index")
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"f": f"{i}.jpg", "n": i, "t": ["a"]}) for i in range(20)))
    words = [str(tmp_path / "index"), "--table", str(tmp_path / "t.jsonl")]
    assert main(["index", "describe", *words, "--key", "f"]) == 0
    assert "2 columns of metadata" in capsys.readouterr().out
    assert main(["index", "info", str(tmp_path / "index")]) == 0
    assert "n (whole numbers), t (lists or objects)" in capsys.readouterr().out
    for key, told in (("x", "has no column x; --key is one of f, n, t"), (None, "key")):
        assert main(["index", "describe", *words, *(["--key", key] if key else [])]) == 2
        err = capsys.readouterr().err
        assert told in err and err.count("\n") == 1
    pq.write_table(pa.table({"f": ["20.jpg"], "n": [20]}), tmp_path / "t.parquet")
    store(tmp_path / "more", rows(21)[20:], items(21)[20:])
    more = ["--table", str(tmp_path / "t.parquet"), "--key", "f"]
    assert main(["index", "add", str(tmp_path / "index"), "--embeddings", str(tmp_path / "more"), *more]) == 0
    assert load_index(tmp_path / "index").metadata.table.column("n").to_pylist() == [*range(21)]
    both = ["--embeddings", str(tmp_path / "store"), "--out", str(tmp_path / "two")]
    assert main(["index", "build", *both, "--table", str(tmp_path / "t.jsonl")]) == 2
    assert "--table and --key go together" in capsys.readouterr().err and not (tmp_path / "two").exists()
    assert main(["index", "build", *both, "--table", str(tmp_path / "t.jsonl"), "--key", "f"]) == 0
    assert read_table(tmp_path / "t.jsonl", "f").columns.num_rows == 20 == len(load_index(tmp_path / "two").metadata)


def test_more_paths_than_one_array_of_arrow_holds():
    """2 GiB of them, in memory once."""
    none = pa.array([b""])
    long = pa.record_batch([pa.array([bytes(1 << 26)]), *[none] * (len(SCHEMA) - 1)], schema=SCHEMA)
    things = ItemTable([*[long] * 32, to_batch([Item("/a.jpg")])])
    metadata = Metadata(pa.table({"year": pa.array([*[None] * 32, 1999])}))
    keys, columns, _ = FaissIndex(np.zeros((33, 2), np.float32), things, "f00d", metadata=metadata).table()
    assert keys.to_pylist() == [b"/a.jpg"] and columns.to_pylist() == [{"year": 1999}]
    stored = Joined([Table(keys, columns)]).of(ItemTable([to_batch([Item("/b.jpg"), Item("/a.jpg")])]))
    assert stored.table.to_pylist() == [{"year": None}, {"year": 1999}]
