import json
import os

import numpy as np
import pytest
from test_faiss_index import items, rows

from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.retrieval import ann
from fromage.retrieval.ann import ANNIndex, default_kind, lists_kind, small_kinds
from fromage.retrieval.faiss_index import FaissIndex
from fromage.retrieval.open_index import load_index
from fromage.retrieval.rerank import Near, rerank, unit

KINDS = ["IVF16,Flat", "IVF16,SQ8", "HNSW16", "IVF8,PQ8x4", "PCA16,IVF8,SQ8", "SQ8"]


@pytest.fixture(scope="module")
def embeddings():
    return rows(2000, q=16)


@pytest.fixture(scope="module", params=KINDS)
def approximate(request, embeddings):
    return FaissIndex.build(embeddings, items(2000), "f00d", kind=request.param)


def test_what_is_found_has_its_exact_score_and_most_of_the_true_nearest_are_found(approximate, embeddings):
    flat, queries = FaissIndex.build(embeddings, items(2000), "f00d"), rows(50, q=16, seed=1)
    scores = {hit.path: hit.score for hit in flat.search(queries[:1], 2000)[0]}
    for hit in approximate.search(queries[:1], 10)[0]:
        assert hit.score == scores[hit.path]
    shares = [
        len({hit.path for hit in found} & {hit.path for hit in true}) / 10
        for found, true in zip(approximate.search(queries, 10), flat.search(queries, 10), strict=True)
    ]
    assert approximate.candidates.recall >= 0.9 and np.mean(shares) > approximate.candidates.recall - 0.07


def test_an_approximate_index_is_saved_with_its_kind_setting_and_recall(approximate, tmp_path):
    approximate.save(tmp_path / "index")
    loaded, queries = load_index(tmp_path / "index", "f00d"), rows(5, q=16, seed=2)
    assert loaded.kind == approximate.kind
    assert loaded.candidates.setting == approximate.candidates.setting
    assert loaded.candidates.recall == approximate.candidates.recall
    assert loaded.candidates.factor == approximate.candidates.factor
    assert not (tmp_path / "index" / "vectors.f32").exists() and loaded.vectors.dtype == np.float16
    for hits, before in zip(loaded.search(queries, 7), approximate.search(queries, 7), strict=True):
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in before], abs=5e-4)
        assert len({hit.path for hit in hits} & {hit.path for hit in before}) >= 6  # the last two may be as good


def test_where_candidates_run_out_every_row_is_looked_at(embeddings):
    index = FaissIndex.build(embeddings, items(2000), "", kind="IVF64,Flat")
    index.candidates.set("nprobe=1")
    flat = FaissIndex.build(embeddings, items(2000), "")
    queries, excluded = rows(3, q=16, seed=1), {f"{i}.jpg" for i in range(0, 1500)}
    assert index.search(queries, 400, excluded) == flat.search(queries, 400, excluded)
    assert [len(hits) for hits in index.search(queries, 5000)] == [2000] * 3


def test_a_small_kind_ranks_as_many_candidates_as_it_takes(tmp_path):
    embeddings, queries = unit(rows(4000, q=64), ""), rows(100, q=64, seed=3)
    small, flat = (FaissIndex.build(embeddings, items(4000), "f00d", kind=kind) for kind in ("auto:small", "flat"))
    assert small.kind == "RaBitQfs" and small.candidates.factor > 5 and small.candidates.recall >= 0.97
    assert small.candidates.index.code_size <= 16
    small.save(tmp_path / "index")
    loaded = load_index(tmp_path / "index")
    assert (
        loaded.factor == small.candidates.factor == json.loads((tmp_path / "index" / "index.json").read_text())["oversample"]
    )
    share = lambda: np.mean([  # noqa: E731
        len({hit.path for hit in found} & {hit.path for hit in true}) / 10
        for found, true in zip(loaded.search(queries, 10), flat.search(queries, 10), strict=True)
    ])  # fmt: skip
    assert share() >= 0.95
    loaded.candidates.factor = 5
    assert share() < 0.9


def test_the_first_small_kind_that_reaches_the_recall_is_taken(embeddings, monkeypatch):
    assert list(small_kinds(1000, 64)) == ["RaBitQfs", "PQ16x4fs", "SQ4"]
    assert list(small_kinds(1_000_000, 256)) == ["IVF4096,RaBitQfs", "IVF4096,PQ64x4fs", "IVF4096,SQ4"]
    monkeypatch.setattr(ANNIndex, "reaches", lambda self: self.kind == "SQ4")
    assert ANNIndex.made("Auto:Small", embeddings, embeddings[:0]).kind == "SQ4"
    check = ann.check_kind
    refuse = lambda kind, width: check("no such kind" if "RaBitQ" in kind else kind, width)  # noqa: E731
    monkeypatch.setattr(ann, "check_kind", refuse)  # an older FAISS
    assert list(small_kinds(1000, 64)) == ["PQ16x4fs", "SQ4"]


def test_scores_of_rounded_rows_are_cosines():
    some = unit(rows(500, q=32), "")
    found = rerank(some[0], Near(np.arange(500), some.astype(np.float16), lambda i: Item(str(i)), True), 20)[0]
    true = rerank(some[0], Near(np.arange(500), some, lambda i: Item(str(i)), True), 20)[0]
    assert [hit.score for hit in found] == pytest.approx([hit.score for hit in true], abs=2e-4)
    assert found[0].path == "0" and found[0].score <= 1 + 1e-6
    damaged = some.astype(np.float16)
    damaged[3], damaged[4] = np.nan, 0
    hits = rerank(some[0], Near(np.arange(500), damaged, lambda i: Item(str(i)), True), 500)[0]
    assert len(hits) == 500 and {hits[-1].path} == {"3"} and np.isfinite([hit.score for hit in hits]).all()


def test_more_thorough_settings_find_more(embeddings):
    candidates = ANNIndex.train("IVF64,Flat", embeddings)
    candidates.grow(embeddings, embeddings[:0])
    assert candidates.recall >= 0.97 and candidates.text_recall is None
    one = ANNIndex(candidates.index, "IVF64,Flat", "nprobe=1").search(embeddings[:20], 30)
    assert all(len(near) <= 30 and (near >= 0).all() for near in one)
    truth = (embeddings[:20] @ embeddings.T).argsort(1)[:, -30:]
    shares = {}
    for setting in ("nprobe=1", "nprobe=8", "nprobe=64"):
        candidates.set(setting)
        near = candidates.search(embeddings[:20], 30)
        shares[setting] = np.mean([len(set(a) & set(b)) / 30 for a, b in zip(near, truth, strict=True)])
    assert shares["nprobe=1"] < shares["nprobe=8"] < shares["nprobe=64"] == 1


def test_texts_that_lie_apart_from_the_images_make_the_search_more_thorough():
    """Images around few centres are found in few lists; texts between them are not."""
    images = unit(np.repeat(rows(40, q=16), 50, axis=0) + 0.3 * rows(2000, q=16, seed=1), "")
    texts = unit(rows(200, q=16, seed=2), "")
    alone, asked = (ANNIndex.train("IVF40,SQ8", images) for _ in range(2))
    alone.grow(images, texts[:0])
    asked.grow(images, texts)
    nprobe = [int(each.setting.removeprefix("nprobe=")) for each in (alone, asked)]
    assert nprobe[0] < nprobe[1] and asked.text_recall >= 0.97
    asked.set(alone.setting)
    truth = (texts @ images.T).argsort(1)[:, -10:]
    share = lambda: np.mean([np.isin(t, near).mean() for t, near in zip(truth, asked.search(texts, 50), strict=True)])  # noqa: E731
    assert share() < 0.97
    asked.tune(images, texts)
    assert asked.text_recall == pytest.approx(share(), abs=1e-3)


@pytest.mark.parametrize("kind", ["IVF4096,SQ8", "no such kind", "IVF4,PQ7", ""])
def test_kinds_that_cannot_be_made_are_refused(kind):
    with pytest.raises(UserError, match=f"kind {kind}(: | of 100 images: )FAISS cannot"):
        FaissIndex.build(rows(100, q=16), items(100), "", kind=kind)


def test_kinds_by_size():
    assert default_kind(1) == default_kind(1_000_000) == "flat"
    assert default_kind(1_000_001) == lists_kind(1_000_000) == "IVF4096,SQ8"
    assert lists_kind(3_300_000) == "IVF8192,SQ8"
    assert FaissIndex.build(rows(3), items(3), "", kind="Flat").kind == "flat"


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_that_faiss_cannot_read_is_damaged(tmp_path, mapped):
    vectors = np.eye(4, dtype=np.float32)
    ANNIndex.train("HNSW4", vectors).write(tmp_path / "index.faiss")
    known = "HNSW4", "efSearch=16", 1.0
    assert ANNIndex.read(tmp_path / "index.faiss", *known, mapped=mapped).setting == "efSearch=16"
    with pytest.raises(UserError, match=r"index\.faiss: is damaged \(.*\); build the index again"):
        ANNIndex.read(tmp_path / "index.faiss", "HNSW4", "nonsense=1", 1.0, mapped=mapped)
    os.truncate(tmp_path / "index.faiss", 60)
    with pytest.raises(UserError, match=r"index\.faiss: is damaged \(.*\); build the index again"):
        ANNIndex.read(tmp_path / "index.faiss", *known, mapped=mapped)
