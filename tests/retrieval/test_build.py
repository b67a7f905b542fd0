"""Indexes made of embeddings and of other indexes, against a flat one of the same rows."""

import multiprocessing
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_faiss_index import Model, items, rows, write_colours

from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.retrieval import build as index_builder
from fromage.retrieval.build import add, build, build_index, import_embeddings, merge, remove
from fromage.retrieval.embedding_store import EmbeddingStore
from fromage.retrieval.faiss_index import FaissIndex
from fromage.retrieval.open_index import load_index, search_index
from fromage.retrieval.rerank import unit


def store(folder, embeddings, things, fingerprint="f00d", per_part=7, dtype="float32"):
    """A store as embed_images leaves it."""
    starts = range(0, len(things), per_part)
    about = {"checkpoint": "a.ckpt", "source": "x", "width": embeddings.shape[1], "dtype": dtype, "parts": len(starts)}
    made = EmbeddingStore.begin(folder, fingerprint=fingerprint, **about)
    for part, start in enumerate(starts):
        made.write(part, embeddings[start : start + per_part], things[start : start + per_part], [])
    return made


def same(index, embeddings, things):
    """Whether an index answers as a flat one of these rows does, but for rows that were rounded to float16."""
    flat, queries = FaissIndex.build(embeddings, things, "f00d"), rows(4, q=embeddings.shape[1], seed=9)
    assert list(index.items) == list(things)
    np.testing.assert_allclose(index.vectors, flat.vectors, atol=5e-4)
    for hits, true in zip(index.search(queries, 5), flat.search(queries, len(things)), strict=True):
        scores = {hit.path: hit.score for hit in true}
        np.testing.assert_allclose([scores[hit.path] for hit in hits], [hit.score for hit in true[:5]], atol=2e-3)
        np.testing.assert_allclose([scores[hit.path] for hit in hits], [hit.score for hit in hits], atol=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_build_is_the_flat_index_of_the_stored_rows(tmp_path, dtype):
    embeddings, things = rows(23), [Item(f"/p/{i}.jpg", "é" * i) for i in range(23)]
    index = build(store(tmp_path / "store", embeddings, things, dtype=dtype), tmp_path / "index")
    same(index, embeddings.astype(dtype), things)
    assert (index.kind, index.fingerprint, index.checkpoint) == ("flat", "f00d", "a.ckpt")


def test_embeddings_of_others_become_an_index(tmp_path):
    photos, loaded = write_colours(tmp_path / "photos"), []
    source, given = tmp_path / "e.pkl", rows(3, q=3)
    paths = ["red/a.png", "blue/a.png", "https://images.example/b.jpg"]
    source.write_bytes(pickle.dumps({"paths": paths, "embeddings": 7 * given}))
    index = import_embeddings(Model, source, tmp_path / "one", images=photos, checkpoint="a/b", kind="flat")
    assert [row[0].path for row in index.search(given, 1)] == [str(photos / paths[0]), str(photos / paths[1]), paths[2]]
    assert (index.checkpoint, index.fingerprint, index.place.within) == ("a/b", "f00d", str(photos))
    assert index.place.confined and len(index.search(["red"], 2)[0]) == 2, "the model is kept for texts"

    def load():
        loaded.append(Model())
        return loaded[-1]

    for sources, out, told in (
        ([source, photos], "two", "import it alone"),
        ([source], "one", "overwrite"),
        (photos, "two", "neither img_emb"),
    ):
        with pytest.raises(UserError, match=told):
            import_embeddings(load, sources, tmp_path / out)
    assert not loaded and not (tmp_path / "two").exists(), "what is wrong is told before a model is loaded"
    assert len(import_embeddings(load, [source], tmp_path / "one", overwrite=True)) == 3 and len(loaded) == 1
    assert load_index(tmp_path / "one").place.within == str(tmp_path / "one"), "no file of this machine is opened"


def test_what_a_stranger_s_paths_say_never_opens_more(tmp_path):
    private = write_colours(tmp_path / "private")
    paths = [str(private / name / "a.png") for name in ("red", "blue")] + ["/elsewhere/c.png"]
    source, out = tmp_path / "e.pkl", tmp_path / "index"
    source.write_bytes(pickle.dumps({"paths": paths, "embeddings": rows(3, q=3)}))
    import_embeddings(Model, source, out, kind="flat")
    remove(out, paths[2])  # what is left has a common folder
    assert load_index(out).place.within == str(out) and load_index(out).root.path == ""
    index = load_index(out)
    index.save(tmp_path / "copy")
    assert load_index(tmp_path / "copy").place.within == str(tmp_path / "copy")
    near = write_colours(tmp_path / "near")
    import_embeddings(Model, source, out, images=near, kind="flat", overwrite=True)
    more = store(
        tmp_path / "store", rows(1, q=3, seed=5), [Item(str(private / "green" / "a.png"), "")], Model().fingerprint()
    )
    more.about["root"] = str(private)
    add(out, more)
    assert load_index(out).place.within == str(near), "no wider than was said"


def test_trusting_with_a_folder_that_is_none_seals_nothing(tmp_path):
    write_colours(tmp_path / "p")
    source = tmp_path / "e.pkl"
    source.write_bytes(pickle.dumps({"paths": ["red/a.png"], "embeddings": rows(1, q=3)}))
    import_embeddings(Model, source, tmp_path / "index", images=tmp_path / "p", kind="flat")
    before = (tmp_path / "index" / "index.json").read_bytes()
    with pytest.raises(UserError, match="is no folder"):
        index_builder.trust(tmp_path / "index", tmp_path / "typo")
    assert (tmp_path / "index" / "index.json").read_bytes() == before


def test_rows_in_float16_are_merged_at_unit_length(tmp_path):
    for name in "ab":
        build(store(tmp_path / f"s{name}", rows(300, seed=ord(name)), [Item(f"/{name}/{i}", "") for i in range(300)]),
              tmp_path / name, kind="IVF4,Flat")  # fmt: skip
    assert load_index(tmp_path / "a").vectors.dtype == np.float16
    whole = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c", kind="flat")
    assert whole.vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(whole.vectors, axis=1), 1, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_adding_removing_and_merging_are_building_anew(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("edits")
    names = data.draw(st.lists(st.integers(0, 40), min_size=4, max_size=40, unique=True))
    kind = data.draw(st.sampled_from(["flat", "IVF2,Flat", "HNSW8"]))
    embeddings, things = rows(41), items(41)
    cut = data.draw(st.integers(2, len(names) - 2))
    take = lambda some: (embeddings[some], [things[i] for i in some])  # noqa: E731
    first, second = names[:cut], names[cut - 2 :]  # two are in both
    build(store(folder / "a", *take(first)), folder / "one", kind)
    build(store(folder / "b", *take(second)), folder / "two", "flat")

    same(merge([folder / "one", folder / "two"], folder / "three"), *take(names))
    same(add(folder / "one", EmbeddingStore.open(folder / "b")), *take(names))
    gone = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=len(names) - 1, unique=True))
    left = [name for name in names if name not in gone]
    index = remove(folder / "one", [f"{name}.jpg" for name in gone])
    same(index, *take(left))
    assert index.kind == kind and len(index) == len(left)


def test_an_approximate_index_keeps_its_kind_and_is_measured_anew(tmp_path):
    embeddings, things = rows(600, q=16), items(600)
    build(store(tmp_path / "a", embeddings[:500], things[:500], per_part=100), tmp_path / "index", "IVF16,SQ8")
    index = add(tmp_path / "index", store(tmp_path / "b", embeddings[500:], things[500:], per_part=100))
    assert (index.kind, index.candidates.index.ntotal, len(index)) == ("IVF16,SQ8", 600, 600)
    for row, thing in zip(embeddings[::50], things[::50], strict=True):
        assert index.search(row[None], 1)[0][0].path == thing.path
    index = remove(tmp_path / "index", [thing.path for thing in things[:300]])
    assert index.candidates.index.ntotal == 300 and index.candidates.recall >= 0.9
    assert index.search(embeddings[:1], 3)[0][0].path not in {thing.path for thing in things[:300]}


def test_merging_into_another_kind(tmp_path):
    for name, some in (("a", slice(0, 150)), ("b", slice(150, 300))):
        build(store(tmp_path / f"{name}.store", rows(300)[some], items(300)[some]), tmp_path / name)
    index = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c", "IVF8,Flat")
    assert (index.kind, len(index)) == ("IVF8,Flat", 300)


def add_in_a_process(folder, embeddings, barrier, tell):
    barrier.wait()
    try:
        add(folder, embeddings)
        tell.send("added")
    except UserError as error:
        tell.send(str(error))


def test_of_two_processes_that_add_at_once_none_loses_what_the_other_added(tmp_path):
    fork, folder = multiprocessing.get_context("fork"), tmp_path / "index"
    build(store(tmp_path / "a", rows(1000), items(1000)), folder)
    mine = [store(tmp_path / n, rows(300), [Item(f"{n}/{i}.jpg") for i in range(300)]) for n in "bc"]
    for _ in range(3):
        barrier, (told, tell) = fork.Barrier(2), fork.Pipe(duplex=False)
        processes = [fork.Process(target=add_in_a_process, args=(folder, each, barrier, tell)) for each in mine]
        for process in processes:
            process.start()
        said = [told.recv() for _ in processes]
        for process in processes:
            process.join()
        assert len(load_index(folder)) == 1000 + 300 * said.count("added")
        assert all(text == "added" or "in use by" in text for text in said)
        build(store(tmp_path / "a", rows(1000), items(1000)), folder, overwrite=True)
    assert not list(tmp_path.glob(".*"))


def test_an_index_that_another_process_writes_is_refused_before_the_work(tmp_path, other_writer, monkeypatch):
    folder, made = tmp_path / "index", store(tmp_path / "a", rows(5), items(5))
    build(made, folder)
    pid = other_writer(folder, beside=True)
    monkeypatch.setattr(index_builder, "embed_images", lambda *args, **options: pytest.fail("hours of work"))
    monkeypatch.setattr("fromage.retrieval.faiss_index.write_rows", lambda *args: pytest.fail("minutes of writing"))
    for act in (
        lambda: add(folder, made),
        lambda: remove(folder, ["1.jpg"]),
        lambda: build(made, folder, overwrite=True),
        lambda: merge([folder], folder, overwrite=True),
        lambda: build_index(Model(), tmp_path, folder, overwrite=True),
    ):
        with pytest.raises(UserError, match=f"index: is in use by process {pid}"):
            act()
    assert len(load_index(folder)) == 5


def test_an_index_is_replaced_only_where_that_is_said(tmp_path, monkeypatch):
    folder, made = tmp_path / "index", store(tmp_path / "a", rows(5), items(5))
    build(made, folder)
    monkeypatch.setattr(index_builder, "embed_images", lambda *args, **options: pytest.fail("hours of work"))
    for act in (
        lambda: build(made, folder),
        lambda: merge([folder], folder),
        lambda: build_index(Model(), tmp_path, folder),
    ):
        with pytest.raises(UserError, match=r"index: is there already.*--overwrite"):
            act()
    assert len(build(store(tmp_path / "b", rows(3), items(3)), folder, overwrite=True)) == 3


def test_what_cannot_be_edited_is_refused_and_stays(tmp_path):
    folder = tmp_path / "index"
    build(store(tmp_path / "a", rows(5), items(5)), folder)
    with pytest.raises(UserError, match=r"no image 9\.jpg"):
        remove(folder, ["1.jpg", "9.jpg"])
    with pytest.raises(UserError, match="at least one image"):
        remove(folder, [item.path for item in items(5)])
    other = store(tmp_path / "b", rows(5), items(5), fingerprint="beef")
    with pytest.raises(UserError, match=r"f00d.*not with beef"):
        add(folder, other)
    build(other, tmp_path / "other")
    with pytest.raises(UserError, match="beef"):
        merge([folder, tmp_path / "other"], tmp_path / "merged")
    with pytest.raises(UserError, match="IVF64"):
        merge([folder], tmp_path / "merged", "IVF64,Flat")
    with pytest.raises(UserError, match="zero rows"):
        build(store(tmp_path / "c", 0 * rows(5), items(5)), folder, overwrite=True)
    assert len(load_index(folder, "f00d")) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "index", "other"]


def test_file_names_outside_unicode_survive_every_stage(tmp_path):
    odd = [Item(b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), "two\nlines\u2028"), Item("plain.jpg")]
    index = build(store(tmp_path / "a", rows(2), odd), tmp_path / "index")
    assert list(index.items) == odd
    assert list(remove(tmp_path / "index", [odd[0].path]).items) == odd[1:]


def test_images_become_an_index_at_once(tmp_path):
    folder = write_colours(tmp_path / "images")
    index = build_index(Model(), folder, tmp_path / "index", checkpoint="a.ckpt")
    hits = search_index(Model(), index, ["red", "blue"], 2)
    assert [row[0].path for row in hits] == [str(folder / name / "a.png") for name in ("red", "blue")]
    assert hits[0][0].score == pytest.approx(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "index"]


def test_a_build_that_was_killed_does_not_embed_again(tmp_path, monkeypatch):
    folder = write_colours(tmp_path / "images")
    monkeypatch.setattr(index_builder, "build", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_index(Model(), folder, tmp_path / "index")
    monkeypatch.undo()
    monkeypatch.setattr(Model, "embed_images", lambda *args: pytest.fail("embedded again"))
    assert len(build_index(Model(), folder, tmp_path / "index")) == 3


def test_a_place_that_is_taken_and_a_kind_that_is_none_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(index_builder, "embed_images", lambda *args, **options: pytest.fail("hours of work"))
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="something else than an index"):
        build_index(Model(), tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"kind IVF,SQ8: FAISS cannot"):
        build_index(Model(), tmp_path, tmp_path / "index", kind="IVF,SQ8")
    monkeypatch.setattr("fromage.retrieval.faiss_index.write_rows", lambda *args: pytest.fail("minutes of writing"))
    with pytest.raises(UserError, match=r"kind IVF,SQ8: FAISS cannot"):
        build(store(tmp_path / "a", rows(5), items(5)), tmp_path / "index", "IVF,SQ8")


def test_an_approximate_index_is_measured_with_captions_too_and_again_when_it_changes(toy_model, tmp_path):
    """Some captions say nothing, and some are too long to be searched for."""
    said = [
        "a red star.",
        "",
        "a big blue ring at the top.",
        "a star " * 2000,
        b"a gr\xfcn star.".decode(errors="surrogateescape"),
    ]
    embeddings, things = rows(200, q=32), [Item(f"{i}.jpg", said[i % 5]) for i in range(200)]
    about = toy_model.fingerprint()
    made = store(tmp_path / "a", embeddings[:150], things[:150], about)
    assert build(made, tmp_path / "unasked", "IVF8,Flat").candidates.text_recall is None
    assert build(made, tmp_path / "flat", "Flat", model=toy_model).texts.shape == (0, 32)
    index = build(made, tmp_path / "index", "IVF8,Flat", model=toy_model)
    want = toy_model.embed_text([said[0], said[2], "a gr\N{REPLACEMENT CHARACTER}n star."]).numpy()
    np.testing.assert_allclose(np.unique(index.texts.round(4), axis=0), np.unique(want.round(4), axis=0), atol=1e-3)
    assert len(index.texts) == 90 and index.candidates.text_recall >= 0.97

    added = add(tmp_path / "index", store(tmp_path / "b", embeddings[150:], things[150:], about))
    left = remove(tmp_path / "index", [f"{i}.jpg" for i in range(100)])
    merged = merge([tmp_path / "index", tmp_path / "unasked"], tmp_path / "merged")
    for each, some in ((added, range(200)), (left, range(100, 200)), (merged, [*range(100, 200), *range(100)])):
        np.testing.assert_array_equal(each.texts, index.texts)
        near = (each.texts @ unit(embeddings[some], "").T).argsort(1)[:, -10:]
        found = each.candidates.search(each.texts, 50)
        shares = [np.isin(true, positions).mean() for true, positions in zip(near, found, strict=True)]
        assert each.candidates.text_recall == pytest.approx(np.mean(shares), abs=1e-3)
    with pytest.raises(UserError, match="another checkpoint"):
        build(made, tmp_path / "other", "IVF8,Flat", model=Model())
