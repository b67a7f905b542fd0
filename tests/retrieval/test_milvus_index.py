"""An index in Milvus answers as a flat one of the same rows does; Milvus Lite stands for the server."""

import fcntl
import json
import sys
from datetime import date, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from test_build import store
from test_faiss_index import Model, items, rows, write_colours

from fromage.cli.main import main
from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.generation.generate import generate
from fromage.generation.options import Decoding
from fromage.retrieval.build import add, build, build_index, describe, merge, remove, trust, write_index
from fromage.retrieval.embedding_store import EmbeddingStore
from fromage.retrieval.faiss_index import FaissIndex
from fromage.retrieval.index_spec import IndexSpec
from fromage.retrieval.item_table import image_id, to_batch
from fromage.retrieval.open_index import load_index, open_index, search_index
from fromage.retrieval.sync import sync
from fromage.retrieval.table_file import Table, field_of
from fromage.retrieval.trust import SEAL, sealed
from fromage.serving.app import create_app
from fromage.serving.image_ids import ImageIds

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    """A place for collections of Milvus Lite."""
    return str(tmp_path_factory.mktemp("milvus") / "all.db")


@pytest.fixture(scope="module")
def client(db):
    """A connection of its own."""
    from pymilvus import MilvusClient

    return MilvusClient(db)


def flat(embeddings, things):
    return FaissIndex.build(embeddings, things, "f00d", "a.ckpt")


def in_milvus(folder, db, embeddings, things, kind=None, overwrite=True):
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return write_index(
        folder, [(unit, to_batch(things))], IndexSpec(unit.shape[1], "f00d", "a.ckpt", kind, milvus=db, overwrite=overwrite)
    )


def same(index, embeddings, things):
    """Whether an index answers as a flat one of these rows does, numbers of the rows aside."""
    queries = rows(4, q=embeddings.shape[1], seed=9)
    plain = lambda found: [[hit._replace(row=-1) for hit in hits] for hits in found]  # noqa: E731
    assert plain(index.search(queries, 5)) == plain(flat(embeddings, things).search(queries, 5))
    batches = list(index.rows())
    assert np.array_equal(np.concatenate([vectors for vectors, _ in batches]), flat(embeddings, things).vectors)
    assert [item for _, items in batches for item in items.column("path").to_pylist()] == [i.path.encode() for i in things]


@pytest.fixture(scope="module")
def tied(db, tmp_path_factory):
    """An index in Milvus and a flat one of 150 rows of small whole numbers, among which many exact ties are."""
    embeddings = np.random.default_rng(0).integers(-1, 2, (150, 3)).astype(np.float32)
    embeddings[~embeddings.any(1)] = 1
    return in_milvus(tmp_path_factory.mktemp("tied") / "index", db, embeddings, items(150)), flat(embeddings, items(150))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_it_finds_what_the_flat_index_finds(tied, data):
    vector = st.lists(st.integers(-1, 1), min_size=3, max_size=3).filter(any)
    queries = np.array(data.draw(st.lists(vector, min_size=1, max_size=4)), dtype=np.float32)
    k, barred = data.draw(st.integers(1, 160)), {f"{i}.jpg" for i in data.draw(st.sets(st.integers(0, 149), max_size=60))}
    index, true = tied
    assert index.search(queries, k, barred) == true.search(queries, k, barred)


def test_many_images_and_all_beyond_the_first(db, tmp_path):
    embeddings, things = np.repeat(rows(200, q=16), 3, axis=0), items(600)
    index, true = in_milvus(tmp_path / "index", db, embeddings, things), flat(embeddings, things)
    queries = rows(20, q=16, seed=1)
    found = index.search(queries, 10)
    assert found == true.search(queries, 10)
    assert list(index.beyond(queries[0], found[0])) == true.search(queries[:1], 600)[0]
    assert np.array_equal(index.vectors_of([7, 3, 7]), true.vectors[[7, 3, 7]])
    assert (len(index), index.width, index.kind, index.search(queries[:0], 3)) == (600, 16, "flat", [])


@pytest.mark.parametrize("kind", ["HNSW,M=16,efConstruction=100", "autoindex"])
def test_other_kinds_are_those_of_milvus_and_their_scores_are_exact(db, tmp_path, client, kind):
    embeddings, things = rows(900, q=16), items(900)
    index, true, queries = (
        in_milvus(tmp_path / "index", db, embeddings, things, kind),
        flat(embeddings, things),
        rows(20, 16, 1),
    )
    scores = {hit.path: hit.score for hit in true.search(queries[:1], 900)[0]}
    assert all(hit.score == scores[hit.path] for hit in index.search(queries[:1], 10)[0])
    pairs = zip(index.search(queries, 10), true.search(queries, 10), strict=True)
    assert np.mean([len({h.row for h in a} & {h.row for h in b}) / 10 for a, b in pairs]) > 0.9
    made = client.describe_index(index.collection.name, "embedding")
    assert (made["index_type"], made["metric_type"]) == (kind.split(",")[0].upper(), "IP")
    assert load_index(tmp_path / "index", "f00d").kind == kind


def test_adding_removing_and_merging_are_building_anew(db, tmp_path, client):
    embeddings, things = rows(41), items(41)
    take = lambda some: (embeddings[some], [things[i] for i in some])  # noqa: E731
    first, second = list(range(30)), list(range(20, 41))
    index = build(store(tmp_path / "a", *take(first)), tmp_path / "one", milvus=db)
    build(store(tmp_path / "b", *take(second)), tmp_path / "two")
    same(index, *take(first))
    same(merge([tmp_path / "one", tmp_path / "two"], tmp_path / "three", milvus=db), embeddings, things)
    same(merge([tmp_path / "one", tmp_path / "two"], tmp_path / "here"), embeddings, things)  # and back on this disk
    same(add(tmp_path / "one", EmbeddingStore.open(tmp_path / "b")), embeddings, things)
    same(add(tmp_path / "one", EmbeddingStore.open(tmp_path / "a")), embeddings, things)
    left = [i for i in range(41) if i not in (0, 7, 40)]
    same(remove(tmp_path / "one", ["40.jpg", "0.jpg", "7.jpg"]), *take(left))
    same(add(tmp_path / "one", EmbeddingStore.open(tmp_path / "b")), *take([*left, 40]))
    assert json.loads((tmp_path / "one" / "index.json").read_text())["count"] == 39
    with pytest.raises(UserError, match=r"no image 7\.jpg"):
        remove(tmp_path / "one", ["1.jpg", "7.jpg"])
    with pytest.raises(UserError, match="none is left"):
        remove(tmp_path / "one", [f"{i}.jpg" for i in [*left, 40]])
    again = load_index(tmp_path / "one", "f00d")
    same(again, *take([*left, 40]))
    assert (again.first(), load_index(tmp_path / "two").first()) == (things[1], things[20])


def test_an_index_json_of_a_former_version_names_no_backend(db, tmp_path):
    in_milvus(tmp_path / "index", db, rows(5), items(5))
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    assert about.pop("backend") == "milvus"
    (tmp_path / "index" / "index.json").write_text(json.dumps(sealed(about)))
    same(load_index(tmp_path / "index", "f00d"), rows(5), items(5))
    (tmp_path / "index" / "index.json").write_text(json.dumps(about | {"backend": "other"}))
    with pytest.raises(UserError, match="'other' is none of faiss, milvus"):
        load_index(tmp_path / "index")


def test_an_index_from_elsewhere_sends_the_token_nowhere(tmp_path, monkeypatch, db):
    """It may name any address: nothing is connected to before the user believes it."""
    import pymilvus

    in_milvus(tmp_path / "index", db, rows(5), items(5))
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    about.pop(SEAL)
    evil = about | {"milvus": about["milvus"] | {"uri": "http://evil.example:19530"}}
    monkeypatch.setenv("FROMAGE_MILVUS_TOKEN", "secret")
    with monkeypatch.context() as patch:
        patch.setattr(pymilvus, "MilvusClient", lambda *args, **more: pytest.fail(f"connected: {args}, {more}"))
        for said in (evil, evil | {SEAL: "0" * 64}, about):
            (tmp_path / "index" / "index.json").write_text(json.dumps(said))
            with pytest.raises(UserError, match=r"was not built here.*fromage index trust"):
                load_index(tmp_path / "index")
        with pytest.warns(UserWarning, match="was not built here"):  # an index in its place drops nothing there
            build(store(tmp_path / "a", rows(5), items(5)), tmp_path / "index", overwrite=True)
    in_milvus(tmp_path / "other", db, rows(5), items(5))
    (tmp_path / "other" / "index.json").write_text(
        json.dumps(json.loads((tmp_path / "other" / "index.json").read_text()) | {SEAL: ""})
    )
    same(trust(tmp_path / "other"), rows(5), items(5))


def test_it_follows_its_folder_and_travels(tmp_path, db):
    photos = write_colours(tmp_path / "photos")
    build_index(Model(), photos, tmp_path / "index", milvus=db)
    (photos / "red" / "a.png").rename(photos / "red" / "b.png")
    (photos / "blue" / "a.png").write_bytes((photos / "green" / "a.png").read_bytes())
    assert sync(tmp_path / "index", photos, Model)[1][:4] == (1, 1, 1, 1)
    moved = photos.rename(tmp_path / "moved")
    index, done = sync(tmp_path / "index", moved, lambda: pytest.fail("nothing to embed"))
    assert done[:4] == (0, 0, 0, 3)
    index = load_index(tmp_path / "index")
    paths = [str(moved / name) for name in ("red/b.png", "blue/a.png", "green/a.png")]
    assert sorted(path.decode() for path in index.paths().to_pylist()) == sorted(paths) and not index.missing().gone
    assert index.search(np.eye(3, dtype=np.float32)[:1], 1)[0][0].path == paths[0]
    assert ImageIds(index).open(ImageIds(index).of(paths[0])).getpixel((0, 0)) == (255, 0, 0)


def test_an_add_that_was_killed_may_be_repeated(db, tmp_path, monkeypatch):
    embeddings, things = rows(41), items(41)
    build(store(tmp_path / "a", embeddings[:5], things[:5]), tmp_path / "index", milvus=db)
    more = store(tmp_path / "b", embeddings, things)
    batches = list(more.batches())
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingStore, "batches", lambda self: iter([*batches[:3], None]))
        with pytest.raises(TypeError):
            add(tmp_path / "index", more)
    same(add(tmp_path / "index", more), embeddings, things)


def test_an_index_that_is_built_anew_drops_its_collection_and_a_failed_one_leaves_none(db, tmp_path, client):
    before, folder = set(client.list_collections()), tmp_path / "index"
    mine = lambda: set(client.list_collections()) - before  # noqa: E731
    one = in_milvus(folder, db, rows(3), items(3))
    with pytest.raises(UserError, match="is there already"):
        in_milvus(folder, db, rows(4), items(4), overwrite=False)
    assert mine() == {one.collection.name}
    two = in_milvus(folder, db, rows(4), items(4))
    assert mine() == {two.collection.name} != {one.collection.name}
    for broken, kind, named in (
        (rows(4), "no,such,kind", "numbers"),
        (rows(4), "nosuch", "NOSUCH"),
        (rows(0), None, "at least one"),
    ):
        with pytest.raises(UserError, match=named):
            in_milvus(folder, db, broken, items(len(broken)), kind)
    assert mine() == {two.collection.name} and len(load_index(folder, "f00d")) == 4
    flat(rows(2), items(2)).save(tmp_path / "other")
    build(store(tmp_path / "a", rows(5), items(5)), folder, overwrite=True)
    assert not mine() and len(load_index(folder, "f00d")) == 5
    with pytest.raises(UserError, match="lies in the folder"):
        in_milvus(tmp_path / "new", str(tmp_path / "new" / "x.db"), rows(4), items(4))


def test_names_outside_unicode_survive_and_long_captions_are_cut(db, tmp_path):
    odd = b"caf\xe9 \"'\\\n.jpg".decode("utf-8", "surrogateescape")
    things = [Item(odd, "two\nlines\u2028"), Item("b.jpg", "é" * 40_000)]
    index = in_milvus(tmp_path / "index", db, rows(2), things)
    (found,) = index.search(rows(2)[:1], 2)
    assert [hit.path for hit in sorted(found)] == [odd, "b.jpg"] and found[0].caption == things[0].caption
    assert found[1].caption == "é" * (65535 // 2)
    assert [
        item.path for item in map(index.finder(), (image_id(odd.encode("utf-8", "surrogateescape")), "0" * 16)) if item
    ] == [odd]
    assert len(remove(tmp_path / "index", [odd])) == 1


def test_ids_of_images_are_asked_of_milvus(db, tmp_path):
    folder = write_colours(tmp_path / "images")
    index = build_index(Model(), folder, tmp_path / "index", checkpoint="a.ckpt", milvus=db)
    ids = ImageIds(index)
    (hit,) = search_index(Model(), index, ["red"], 1)[0]
    assert hit.path == str(folder / "red" / "a.png") and ids.open(ids.of(hit.path)).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(UserError, match="none of this id"):
        ids.open("f" * 16)


def test_answers_and_the_server_show_the_same_images(db, tmp_path, model, index):
    there = write_index(tmp_path / "index", index.rows(), IndexSpec(index.width, index.fingerprint, milvus=db))
    said, shown = [], []
    for one in (index, there):
        said.append(generate(model, ["a red image"], Decoding(max_new_tokens=6, ret_bias=1e4, max_images=3), one)[0].parts)
        with TestClient(create_app(model, one)) as client:
            hits = client.post("/search", json={"query": "blue", "k": 4}).json()["hits"]
            shown.append([hits, *(client.get(f"/images/{hit['id']}").content for hit in hits)])
    assert said[0] == said[1] and any(getattr(part, "hits", None) for part in said[1])
    assert shown[0] == shown[1] and len(shown[1]) == 5


# --- the command line, and what goes wrong --------------------------------------------------------------------------------


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    """A checkpoint of the model of three colours."""
    for module in ("models.fromage", "retrieval.open_index"):
        monkeypatch.setattr(f"fromage.{module}.load_model", lambda path, device="cpu", **options: Model())
    (tmp_path / "a.ckpt").touch()
    return str(tmp_path / "a.ckpt")


def test_every_verb(ckpt, db, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FROMAGE_MILVUS_TOKEN", "secret")
    images, at = write_colours(tmp_path / "images"), lambda name: str(tmp_path / name)
    red, blue = (str(images / name / "a.png") for name in ("red", "blue"))
    some = ["--ckpt", ckpt, "--images", str(images)]
    assert main(["index", "build", *some, "--out", at("index"), "--milvus", db]) == 0
    assert f"3 images, flat, in Milvus at {db} -> " in capsys.readouterr().out
    assert main(["index", "embed", *some, "--out", at("all")]) == 0
    assert main(["index", "remove", at("index"), blue]) == 0
    assert main(["index", "add", at("index"), "--embeddings", at("all")]) == 0
    assert main(["index", "merge", at("index"), "--out", at("merged"), "--milvus", db]) == 0
    capsys.readouterr()
    assert main(["index", "info", at("merged")]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("count              3", "collection         fromage_f00d_", db, "Milvus answers"))
    assert main(["search", "blue", "--index", at("merged"), "-k", "2"]) == 0
    assert blue in capsys.readouterr().out.splitlines()[1]
    assert open_index(at("merged"))[1].search(np.eye(3, dtype=np.float32)[:1], 1)[0][0].path == red
    assert "secret" not in (tmp_path / "merged" / "index.json").read_text()


def test_what_is_wrong_is_one_line(ckpt, db, tmp_path, capsys, client):
    build(store(tmp_path / "a", rows(5), items(5)), tmp_path / "index", milvus=db)
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    other, gone, away, moved = (tmp_path / name for name in ("other", "gone", "away", "moved"))
    for folder, change in (
        (other, {"width": 7}),
        (gone, {"milvus": about["milvus"] | {"collection": "fromage_f00d_0"}}),
        (away, {"milvus": about["milvus"] | {"uri": "http://127.0.0.1:1"}}),
        (moved, {"milvus": about["milvus"] | {"uri": str(tmp_path / "moved.db")}}),
    ):
        folder.mkdir()
        (folder / "index.json").write_text(json.dumps(sealed(about | change)))
    out = ["--embeddings", str(tmp_path / "a"), "--out", str(tmp_path / "out")]
    for words, named in (
        (["search", "red", "--index", str(other)], "not the collection of this index"),
        (["search", "red", "--index", str(gone)], "no collection fromage_f00d_0"),
        (["search", "red", "--index", str(away)], "see that the server runs"),
        (["search", "red", "--index", str(moved)], "has no collection"),
        (["index", "build", *out, "--milvus", "http://127.0.0.1:1"], "see that the server runs"),
        (["index", "build", *out, "--milvus", "http://me:secret@there:1"], "may hold no password"),
        (["index", "build", *out, "--milvus", "there:19530"], "neither the address"),
        (["index", "build", *out, "--milvus", db, "--kind", "IVF4,SQ8"], "such as HNSW"),
    ):
        assert main(words) == 2, words
        said = capsys.readouterr().err
        assert named in said and said.count("\n") == 1 and "secret" not in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "moved.db").exists()
    with pytest.raises(UserError, match=r"f00d.*not with beef"):
        load_index(tmp_path / "index", "beef")


def test_without_pymilvus_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(UserError, match=r"\.\[milvus\]"):
        in_milvus(tmp_path / "index", str(tmp_path / "a.db"), rows(3), items(3))


def test_one_process_at_a_time_uses_a_local_one(tmp_path):
    (tmp_path / "taken.db").mkdir()
    with (tmp_path / "taken.db" / "LOCK").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="one process at a time"):
            in_milvus(tmp_path / "index", str(tmp_path / "taken.db"), rows(3), items(3))


def test_a_server_by_its_address_and_what_is_said_when_it_goes(tmp_path, monkeypatch):
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    from fromage.retrieval import milvus_collection as milvus_collection

    server, lite, port = start_server_in_thread(data_dir=str(tmp_path / "served"), host="127.0.0.1", port=0)
    embeddings, things = rows(41), items(41)
    index = in_milvus(tmp_path / "index", f"http://127.0.0.1:{port}", embeddings, things)
    same(load_index(tmp_path / "index", "f00d"), embeddings, things)
    server.stop(grace=0)
    lite.close()
    monkeypatch.setattr(milvus_collection, "SECONDS", 0.5)
    with pytest.raises(UserError, match=f"Milvus at http://127.0.0.1:{port}"):
        index.search(rows(1), 3)


def told(things, n):
    """Columns of every kind for n images, and a gap."""
    kinds = {
        "year": "int64",
        "place": "string",
        "s": "double",
        "sold": "bool",
        "taken": "timestamp[us]",
        "day": "date32[day]",
    }
    values = [
        {
            "year": 2000 + i % 30,
            "place": ["Rome", 'O\'Hara "x"', "a\\b\n", "é"][i % 4],
            "s": i / 7 if i % 5 else None,
            "sold": bool(i % 2),
            "taken": datetime(2019, 1, 1) + timedelta(hours=i),
            "day": date(1960, 1, 1) + timedelta(days=300 * i),
            "tags": json.dumps([i]),
        }
        for i in range(n)
    ]
    values[n // 2] = {"year": 1}
    schema = pa.schema([field_of(name, kind) for name, kind in (kinds | {"tags": "json"}).items()])
    return Table(pa.array([thing.path.encode() for thing in things[:n]]), pa.Table.from_pylist(values, schema), "t")


FILTERS = [
    "year >= 2019 and place = 'Rome'",
    "place = 'O''Hara \"x\"' or place = 'a\\b\n'",
    "place like '%x%' or place like 'é'",
    "not (place like 'R%') and s is not null",
    "not s > 5 and year in (2001, 2003, 2005.0, 7)",
    "s is null or year < 2001.5",
    "sold = true and taken >= '2019-01-02T03:00'",
    "taken between '2019-01-01' and '2019-01-01T12:00+02:00'",
    "day < '1970-01-01' and not sold = false",
    "day not in ('1960-01-01') and tags is not null",
    "place != 'Rome' and year not in (2001, 2002)",
    "year > 99999999999999999999",
    "year != 1e30 and s >= -1e-3",
]


@pytest.mark.parametrize("where", FILTERS)
def test_filters_mean_in_milvus_what_they_mean_on_this_disk(filtered, where):
    milvus, disk = filtered
    queries, plain = rows(3, seed=5), lambda found: [[hit._replace(row=-1) for hit in hits] for hits in found]
    assert plain(milvus.search(queries, 100, where=where)) == plain(disk.search(queries, 100, where=where))
    assert plain(milvus.search(queries, 3, "7.jpg", where)) == plain(disk.search(queries, 3, "7.jpg", where))


@pytest.fixture(scope="module")
def filtered(db, tmp_path_factory):
    """The same rows with the same metadata in Milvus and on disk."""
    folder, table = tmp_path_factory.mktemp("filtered"), told(items(60), 60)
    batches = [(flat(rows(60), items(60)).vectors, to_batch(items(60)))]
    return [
        write_index(folder / name, batches, IndexSpec(4, "f00d", kind="flat", milvus=address or "", tables=[table]))
        for name, address in (("milvus", db), ("disk", None))
    ]


def test_metadata_in_milvus_follow_their_images(db, tmp_path):
    things = [Item(f"/p/{i}.jpg") for i in range(9)]
    table = told(things, 6)
    with pytest.warns(UserWarning, match="1 of 7 images"):
        build(store(tmp_path / "a", rows(9)[:7], things[:7]), tmp_path / "index", milvus=db, tables=[table])
    with pytest.warns(UserWarning, match="1 of 7 images"):
        build(store(tmp_path / "d", rows(9)[:7], things[:7]), tmp_path / "disk", tables=[table])
    more = Table(pa.array([b"7.jpg"]), pa.table({"year": [1977]}), "u")
    for name in ("index", "disk"):
        add(tmp_path / name, store(tmp_path / f"more {name}", rows(9)[7:], things[7:]), [more])
        remove(tmp_path / name, ["/p/2.jpg"])
    milvus, disk = load_index(tmp_path / "index"), load_index(tmp_path / "disk")
    for where in ("year = 1977", "taken >= '2019-01-01T02:00'", "year is null", "s is not null"):
        found, known = ([hit.path for hit in each.search(rows(1), 9, where=where)[0]] for each in (milvus, disk))
        assert found == known and found
    back = merge([tmp_path / "index"], tmp_path / "back")
    assert back.metadata.table.to_pylist() == disk.metadata.table.to_pylist()
    assert [batch.column("meta").to_pylist() for _, batch in milvus.rows()] == [[b""] * 8], (
        "columns are no part of the items"
    )
    with pytest.raises(UserError, match="has no such column odd; build the index again"):
        other = Table(pa.array([b"8.jpg"]), pa.table({"odd": [1]}), "u")
        add(tmp_path / "index", store(tmp_path / "c", rows(10)[9:], [Item("/p/9.jpg")]), [other])
    with pytest.raises(UserError, match="build it again with --table"):
        describe(tmp_path / "index", [more])
    bare = in_milvus(tmp_path / "bare", db, rows(2), items(2))
    with pytest.raises(UserError, match="has no metadata; build it again"):
        bare.search(rows(1), 1, where="year = 1")
