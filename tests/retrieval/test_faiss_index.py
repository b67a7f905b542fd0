import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.models.fromage import Fromage
from fromage.retrieval import index_folder
from fromage.retrieval import open_index as open_index_module
from fromage.retrieval.faiss_index import FaissIndex
from fromage.retrieval.image_root import ImageAccess, ImageRoot
from fromage.retrieval.item_table import ItemTable, to_batch
from fromage.retrieval.metadata import Metadata
from fromage.retrieval.open_index import load_index, open_index, search_index

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def to_tensor(image):
    assert image.mode == "RGB"
    return torch.from_numpy(np.asarray(image.resize((2, 2)), dtype=np.float32)).permute(2, 0, 1) / 255


class Vision(nn.Module):
    width, transform = 3, staticmethod(to_tensor)

    def forward(self, pixels):
        assert not torch.is_grad_enabled()
        return pixels.mean((2, 3))


class Model(nn.Module):
    """Embeds an image as its mean colour, a text as the colour it names, and several parts as their sum."""

    device, q = torch.device("cpu"), 3

    def __init__(self):
        super().__init__()
        self.vision = Vision()

    def embed_images(self, features):
        return nn.functional.normalize(features, dim=-1)

    def embed_text(self, texts):
        listed = [text if isinstance(text, list) else [text] for text in texts]
        rows = [sum(self.colour(part) for part in parts) for parts in listed]
        return self.embed_images(torch.stack(rows))

    def colour(self, part):
        return torch.tensor(COLOURS[part]) / 255 if isinstance(part, str) else to_tensor(part).mean((1, 2))

    def trained(self):
        return {}

    def fingerprint(self):
        return "f00d"


def items(n):
    return [Item(f"{i}.jpg", f"image {i}") for i in range(n)]


def rows(n, q=4, seed=0):
    return np.random.default_rng(seed).normal(size=(n, q)).astype(np.float32)


def write_colours(folder):
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (9, 5), colour).save(folder / name / "a.png")
    return folder


# --- search -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_search_is_the_brute_force_product(data):
    """Small whole numbers make many exact ties, which must come in the order of the index."""
    q = data.draw(st.integers(1, 4))
    vector = st.lists(st.integers(-1, 1), min_size=q, max_size=q).filter(any)
    embeddings = np.array(data.draw(st.lists(vector, min_size=1, max_size=30)), dtype=np.float32)
    queries = np.array(data.draw(st.lists(vector, min_size=1, max_size=4)), dtype=np.float32)
    k, barred = data.draw(st.integers(1, 40)), data.draw(st.sets(st.integers(0, 35), max_size=8))
    index = FaissIndex.build(embeddings, items(len(embeddings)), "")
    found = index.search(queries, k, {f"{i}.jpg" for i in barred})

    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    for query, hits in zip(queries, found, strict=True):
        scores = (unit.astype(np.float64) * (query / np.linalg.norm(query))).sum(1)
        order = [i for i in np.argsort(-scores, kind="stable") if i not in barred][:k]
        assert [hit.path for hit in hits] == [f"{i}.jpg" for i in order]
        assert [hit.rank for hit in hits] == list(range(1, len(order) + 1))
        np.testing.assert_allclose([hit.score for hit in hits], scores[order], atol=1e-6)


def test_equal_rows_keep_their_order_in_any_batch():
    embeddings = np.repeat(rows(3, q=37), 100, axis=0)  # 100 equal rows each: more than FAISS is asked for at first
    index, queries = FaissIndex.build(embeddings, items(300), ""), rows(50, q=37, seed=1)
    together = index.search(queries, 7)
    assert together == [index.search(query[None], 7)[0] for query in queries]
    for hits in together:
        first = int(hits[0].path.removesuffix(".jpg"))
        assert first % 100 == 0
        assert [hit.path for hit in hits] == [f"{first + i}.jpg" for i in range(7)]


def test_many_images_agree_with_torch():
    embeddings, queries = rows(2000, q=64), rows(30, q=64, seed=1)
    found = FaissIndex.build(embeddings, items(2000), "").search(queries, 10)
    cosine = nn.functional.cosine_similarity(torch.tensor(queries)[:, None], torch.tensor(embeddings)[None], dim=-1)
    best = cosine.topk(10).indices.tolist()
    assert [[int(hit.path[:-4]) for hit in hits] for hits in found] == best


def test_the_same_path_twice_is_excluded_twice():
    index = FaissIndex.build(rows(3), [Item("a"), Item("b"), Item("a")], "")
    assert [hit.path for hit in index.search(rows(1), 5, {"a"})[0]] == ["b"]
    assert index.search(rows(1), 5, {"a", "b"}) == [[]]


def test_search_of_no_query():
    assert FaissIndex.build(rows(3), items(3), "").search(np.empty((0, 4)), 2) == []


@pytest.mark.parametrize("queries", [rows(1, q=5), rows(1)[0], 0 * rows(1), np.nan * rows(1)])
def test_bad_searches_are_refused(queries):
    index = FaissIndex.build(rows(3), items(3), "")
    with pytest.raises(UserError):
        index.search(queries, 1)
    with pytest.raises(UserError, match="whole number from 1"):
        index.search(rows(1), 0)


@pytest.mark.parametrize("embeddings", [rows(0), rows(2), rows(3)[0], 0 * rows(3), np.inf * rows(3)])
def test_bad_builds_are_refused(embeddings):
    with pytest.raises(UserError):
        FaissIndex.build(embeddings, items(3 if len(embeddings) else 0), "")


# --- save and load ----------------------------------------------------------------------------------------------------


def test_an_index_changes_nothing_of_the_table_it_is_given():
    table = ItemTable([to_batch([Item("a.jpg")])], ImageRoot("/old"))
    index = FaissIndex(np.eye(1, dtype=np.float32), table, "f00d", metadata=Metadata(pa.table({"n": [7]})))
    index.set_place(ImageAccess(ImageRoot("/new")))
    assert (index.items[0].path, index.items[0].meta) == ("/new/a.jpg", '{"n": 7}')
    assert table == [Item("/old/a.jpg")]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=5))
def test_what_is_saved_is_loaded(tmp_path_factory, pairs):
    index = FaissIndex.build(rows(len(pairs)), [Item(*pair) for pair in pairs], "f00d", "runs/a.ckpt")
    folder = tmp_path_factory.mktemp("saved") / "deep" / "index"
    index.save(folder)
    loaded = load_index(folder, "f00d")
    assert (loaded.items, loaded.fingerprint, loaded.checkpoint) == (index.items, "f00d", "runs/a.ckpt")
    assert loaded.search(rows(2), 9) == index.search(rows(2), 9)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["index"]


def test_file_names_outside_unicode_survive(tmp_path):
    odd = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")  # what Linux makes of a Latin-1 file name
    FaissIndex.build(rows(1), [Item(odd, "two\nlines\u2028")], "").save(tmp_path / "index")
    assert load_index(tmp_path / "index").items == [Item(odd, "two\nlines\u2028")]


@pytest.mark.parametrize("name", ["vectors.f16", "items.arrow", "index.faiss"])
def test_damage_is_refused(tmp_path, name):
    folder = tmp_path / "index"
    FaissIndex.build(rows(9), items(9), "", kind="IVF2,Flat").save(folder)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=name):
        load_index(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        load_index(folder)


STRANGE = [
    {"format": "x"},
    {"version": 1},
    {"count": 8},
    {"width": 3},
    {"kind": "HNSW8"},
    {"files": {}},
    {"files": {"vectors.f32": {"bytes": "many"}, "items.arrow": 3}},
    {"files": None},
    None,
]


@pytest.mark.parametrize("change", STRANGE)
def test_a_strange_index_json_is_refused(tmp_path, change):
    FaissIndex.build(rows(9), items(9), "").save(tmp_path / "index")
    about = tmp_path / "index" / "index.json"
    about.write_text("[]" if change is None else json.dumps(json.loads(about.read_text()) | change))
    with pytest.raises(UserError, match="index"):
        load_index(tmp_path / "index")


def test_the_index_of_another_checkpoint_is_refused(tmp_path):
    FaissIndex.build(rows(2), items(2), "aaaa", "old.ckpt").save(tmp_path / "index")
    with pytest.raises(UserError, match=r"aaaa \(old.ckpt\), not with bbbb.*fromage index build"):
        load_index(tmp_path / "index", "bbbb")


def test_there_is_no_index(tmp_path):
    with pytest.raises(UserError, match="fromage index build"):
        load_index(tmp_path / "none")


def test_only_an_index_is_replaced(tmp_path):
    index = FaissIndex.build(rows(2), items(2), "")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "within").mkdir(parents=True)
    index.save(tmp_path / "index")
    (tmp_path / "index" / "notes.txt").write_text("mine")
    for name in ("file", "folder", "index"):
        with pytest.raises(UserError, match="something else than an index"):
            index.save(tmp_path / name)
    assert (tmp_path / "index" / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))


def test_an_index_is_replaced_only_where_that_is_said(tmp_path):
    old, new = FaissIndex.build(rows(2), items(2), ""), FaissIndex.build(rows(3), items(3), "")
    old.save(tmp_path / "index")
    with pytest.raises(UserError, match=r"index: is there already.*--overwrite"):
        new.save(tmp_path / "index")
    assert len(load_index(tmp_path / "index")) == 2
    new.save(tmp_path / "index", overwrite=True)
    assert len(load_index(tmp_path / "index")) == 3


class Killed(BaseException):
    """Stands for the signal that ends a process in the middle."""


@pytest.mark.parametrize("when", ["items", "digests", "swap"])
@pytest.mark.parametrize("error", [Killed, OSError, RuntimeError])
def test_an_interrupted_save_leaves_the_old_index(tmp_path, monkeypatch, when, error):
    folder, rename = tmp_path / "index", type(tmp_path).rename
    FaissIndex.build(rows(2), items(2), "old").save(folder)

    def fail(*args):
        raise error("interrupted")

    if when == "items":
        monkeypatch.setattr(index_folder, "write_items", fail)
    elif when == "digests":
        monkeypatch.setattr(index_folder, "digest_of", fail)
    else:
        new_in = lambda path, to: fail() if path.name.endswith(".new") else rename(path, to)  # noqa: E731
        monkeypatch.setattr(type(tmp_path), "rename", new_in)
    with pytest.raises(Killed if error is Killed else UserError):
        FaissIndex.build(rows(3), items(3), "new").save(folder, overwrite=True)
    monkeypatch.undo()
    assert len(load_index(folder, "old")) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


def test_a_process_killed_between_the_renames_is_explained_and_mended(tmp_path):
    folder, aside = tmp_path / "index", tmp_path / ".index.old"
    FaissIndex.build(rows(2), items(2), "old").save(folder)
    folder.rename(aside)
    with pytest.raises(UserError, match="rename"):
        load_index(folder)
    shutil.copytree(aside, folder)
    FaissIndex.build(rows(3), items(3), "new").save(folder, overwrite=True)
    assert len(load_index(folder, "new")) == 3
    assert not aside.exists()


def test_an_index_that_is_set_aside_is_not_built_over(tmp_path):
    folder, aside = tmp_path / "index", tmp_path / ".index.old"
    FaissIndex.build(rows(2), items(2), "old").save(folder)
    folder.rename(aside)
    with pytest.raises(UserError, match=r"the former index is whole: rename .*\.index\.old"):
        FaissIndex.build(rows(3), items(3), "new").save(folder)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UserError, match=r"the former index is whole: rename .*\.index\.old"):
        load_index(tmp_path / "link", "old")
    assert len(load_index(aside, "old")) == 2
    FaissIndex.build(rows(3), items(3), "new").save(folder, overwrite=True)
    assert len(load_index(folder, "new")) == 3 and not aside.exists()


def test_a_large_file_that_is_torn_is_noticed_at_once_and_any_damage_by_the_full_check(tmp_path, monkeypatch):
    monkeypatch.setattr(index_folder, "BLOCK", 64)
    monkeypatch.setattr(index_folder, "BLOCKS", 4)
    folder, n = tmp_path / "index", 4000
    FaissIndex.build(rows(n), items(n), "").save(folder)
    path, about = folder / "vectors.f32", index_folder.read_about(folder)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))  # the second half never reached the disk
    with pytest.raises(UserError, match="vectors"):
        load_index(folder)
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])  # between the blocks that are looked at
    index_folder.check_files(folder, about)
    with pytest.raises(UserError, match="vectors"):
        index_folder.check_files(folder, about, full=True)
    path.write_bytes(data)
    index_folder.check_files(folder, about, full=True)


def test_a_saved_index_is_not_read_into_memory(tmp_path):
    FaissIndex.build(rows(9), items(9), "").save(tmp_path / "index")
    assert isinstance(load_index(tmp_path / "index").vectors, np.memmap)


# --- with a model -----------------------------------------------------------------------------------------------------


def test_an_index_finds_its_checkpoint(tmp_path, monkeypatch):
    loaded = lambda path, device: SimpleNamespace(path=str(path), fingerprint=lambda: "f00d")  # noqa: E731
    monkeypatch.setattr(open_index_module, "load_model", loaded)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.ckpt").touch()
    FaissIndex.build(rows(3), items(3), "f00d", str(tmp_path / "a.ckpt")).save("index")
    model, index = open_index("index")
    assert (model.path, len(index)) == (str(tmp_path / "a.ckpt"), 3)
    (tmp_path / "a.ckpt").rename("b.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt.*--ckpt"):
        open_index("index")
    assert open_index("index", "b.ckpt")[0].path == "b.ckpt"
    monkeypatch.setattr(open_index_module, "load_model", lambda path, device: SimpleNamespace(fingerprint=lambda: "beef"))
    with pytest.raises(UserError, match=r"f00d.*beef"):
        open_index("index", "b.ckpt")


def test_search_for_texts():
    colours = np.array(list(COLOURS.values()), dtype=np.float32)
    index = FaissIndex.build(colours, [Item(name) for name in COLOURS], "f00d")
    assert [row[0].path for row in search_index(Model(), index, ["red", "blue"], 2)] == ["red", "blue"]
    assert search_index(Model(), index, [], 2) == []
    with pytest.raises(UserError, match="built with checkpoint beef"):
        search_index(Model(), FaissIndex.build(colours, [Item(name) for name in COLOURS], "beef"), ["red"])


def test_a_model_is_digested_once_and_again_when_it_has_changed(toy_model, monkeypatch):
    index = FaissIndex.build(rows(3, q=32), items(3), toy_model.fingerprint())
    kept = {name: p.clone() for name, p in toy_model.trained().items()}
    digests, fingerprint = [], Fromage.fingerprint
    monkeypatch.setattr(Fromage, "fingerprint", lambda self: digests.append(self) or fingerprint(self))
    for _ in range(3):
        search_index(toy_model, index, ["a red star."], 1)
    assert len(digests) == 1

    toy_model.text_head.bias.grad = torch.ones_like(toy_model.text_head.bias)
    step = torch.optim.Adam([toy_model.text_head.bias]).step
    replace = lambda: setattr(toy_model.logit_scale, "data", toy_model.logit_scale.data + 1)  # noqa: E731
    for change in (step, replace, lambda: toy_model.image_head.bfloat16()):
        change()
        for _ in range(2):  # a refusal is not forgotten
            with pytest.raises(UserError, match="built with"):
                index.require_model(toy_model)
        toy_model.float().load_state_dict(kept, strict=False)
        index.require_model(toy_model)
    with pytest.raises(UserError, match="built with"):
        index.require_model(Fromage.load(k=2, q=32, seed=1))


def test_an_index_of_another_kind_of_ret_is_refused():
    one = Fromage.load(k=2, q=32)
    index = FaissIndex.build(rows(3, q=32), items(3), one.fingerprint())
    for other in ({"r": 4}, {"ret_fusion": "transformer"}):
        with pytest.raises(UserError, match="built with"):
            search_index(Fromage.load(k=2, q=32, **other), index, ["a red star."], 1)
    three = [Fromage.load(k=2, q=32, r=3, **more) for more in ({}, {"ret_attention": "stacked"}, {"ret_fusion": "first"})]
    assert len({model.fingerprint() for model in [one, *three]}) == 4
    assert Fromage.load(k=2, q=32, ret_attention="sequential", r=1).fingerprint() == one.fingerprint()
    index = FaissIndex.build(rows(3, q=32), items(3), three[1].fingerprint())
    index.require_model(three[1])
    with pytest.raises(UserError, match="built with"):
        index.require_model(three[0])


def test_a_model_loaded_in_inference_mode_has_an_index_too():
    with torch.inference_mode():
        model = Fromage.load(k=2, q=32)
    FaissIndex.build(rows(3, q=32), items(3), model.fingerprint()).require_model(model)


def test_what_can_be_no_query():
    index = FaissIndex.build(rows(9), items(9), "")
    for queries, k, named in (("a red star", 3, "texts"), ([["red"]], 3, "texts"), (rows(1), "3", "k is '3'")):
        with pytest.raises(UserError, match=named):
            index.search(queries, k)


@pytest.mark.parametrize("kind", ["flat", "IVF4,SQ8"])
def test_beyond_the_hits_of_a_search_there_are_all_others(kind):
    index, query = FaissIndex.build(rows(200), items(200), "", kind=kind), rows(1, seed=5)
    barred = {"3.jpg", "7.jpg"}
    hits = index.search(query, 3, barred)[0]
    found = list(index.beyond(query[0], hits, barred))
    assert found[:3] == hits and [hit.rank for hit in found] == list(range(1, 199))
    assert {hit.path for hit in found} == {item.path for item in index.items} - barred
    if kind == "flat":
        assert found == index.search(query, 200, barred)[0]
