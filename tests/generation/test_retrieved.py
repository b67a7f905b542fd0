"""What a [RET] finds: the nearest images but those of the prompt, none twice, and the next best for one that is gone."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fromage.data.image_source import Item
from fromage.generation.retrieved import ImageRetriever
from fromage.models.prompts import Url, encode_images
from fromage.retrieval.faiss_index import FaissIndex
from fromage.retrieval.results import load_images


@pytest.fixture
def folder(world, tmp_path):
    """Twenty images, one of them under three names."""
    out = tmp_path / "images"
    out.mkdir()
    for path in sorted((world / "coco" / "val2017").glob("*"))[:20]:
        shutil.copy(path, out / path.name)
    first = min(out.iterdir())
    for name in ("copy1", "copy2"):
        shutil.copy(first, out / f"{name}{first.suffix}")
    return out


@pytest.fixture
def index(toy_model, folder):
    paths = sorted(folder.iterdir())
    rows = torch.cat([toy_model.embed_images(encode_images(toy_model, [path])) for path in paths])  # (N, q)
    return FaissIndex.build(rows.detach().numpy(), [Item(str(path)) for path in paths], toy_model.fingerprint())


@pytest.fixture
def hidden(toy_model):
    return torch.randn(1, toy_model.lm.width, generator=torch.Generator().manual_seed(0))


def retriever(model, index, prompt=(), count=1, resolve=None):
    images = [part for part in prompt if not isinstance(part, str) or isinstance(part, Url)]
    features = encode_images(model, [p for p in images if not isinstance(p, Url)])
    return ImageRetriever(model, index, resolve, count, list(prompt), features)


def brute_force(model, index, hidden):
    """Paths of all images, nearest first, each under one name."""
    row = model.embed_ret(hidden.unsqueeze(0)).detach().numpy()[0]
    scores = (index.vectors.astype(np.float64) * row).sum(1)  # a product of matrices need not give equal rows equal scores
    _, first = np.unique(index.vectors.round(4), axis=0, return_index=True)
    return [index.items[i].path for i in np.argsort(-scores, kind="stable") if i in first]


def test_the_nearest(toy_model, index, hidden):
    shown = retriever(toy_model, index, count=4).find(hidden)
    assert [hit.path for hit in shown.hits] == brute_force(toy_model, index, hidden)[:4]
    assert [hit.rank for hit in shown.hits] == [1, 2, 3, 4] and shown.images == shown.notes == []
    assert np.linalg.norm(shown.embedding) == pytest.approx(1, abs=1e-5)


def test_none_twice(toy_model, index, hidden):
    mine, order = retriever(toy_model, index, count=2), brute_force(toy_model, index, hidden)
    assert len(order) == len(index) - 2, "two are copies"
    seen = [hit.path for _ in range(len(index)) for hit in mine.find(hidden).hits]
    assert seen == order  # and then no more
    hits = retriever(toy_model, index, count=len(index)).find(hidden).hits
    assert [hit.path for hit in hits] == order and [hit.rank for hit in hits] == list(range(1, len(order) + 1))


def test_images_of_the_prompt_are_known_by_name(toy_model, index, hidden, folder, monkeypatch):
    monkeypatch.setattr(ImageRetriever, "seen", np.empty((0, toy_model.q), np.float32))
    first, second = brute_force(toy_model, index, hidden)[:2]
    monkeypatch.chdir(folder)
    for same in (Path(first), Path(first).relative_to(folder), folder / "." / Path(first).name):
        assert retriever(toy_model, index, [same]).find(hidden).hits[0].path == second
    other = FaissIndex.build(index.vectors[:1], [index.items[0]._replace(path="https://a.org/b.jpg")], "")
    assert retriever(toy_model, other, [Url("https://a.org/b.jpg")]).find(hidden).hits == []


def test_images_of_the_prompt_are_known_by_content(toy_model, index, hidden, folder, tmp_path):
    copies = {str(min(folder.glob("[!c]*"))), *map(str, folder.glob("copy*"))}
    elsewhere = shutil.copy(min(folder.glob("copy*")), tmp_path / "elsewhere.jpg")
    for same in (Path(elsewhere), Image.open(elsewhere)):
        found = retriever(toy_model, index, ["a", same], count=len(index)).find(hidden)
        assert {hit.path for hit in found.hits} == {item.path for item in index.items} - copies


def test_a_copy_is_known_though_it_was_embedded_in_bfloat16_or_saved_again(toy_model, index, hidden, folder, tmp_path):
    first = brute_force(toy_model, index, hidden)[0]
    Image.open(first).save(tmp_path / "again.jpg", quality=97, subsampling=0)
    noise = np.random.default_rng(0).normal(size=index.vectors.shape).astype(np.float32)
    rounded = index.vectors + 1e-2 * noise / np.linalg.norm(noise, axis=1, keepdims=True)  # cosines of 1 - 5e-5
    other = FaissIndex.build(rounded, [item._replace(path=f"of {item.path}") for item in index.items], "")
    for same in (Path(first), tmp_path / "again.jpg"):
        found = retriever(toy_model, other, [same], count=len(index)).find(hidden).hits
        assert f"of {first}" not in [hit.path for hit in found] and found


def test_many_copies_in_the_index(toy_model, index, hidden):
    """More of them than are asked for at first."""
    vectors = np.concatenate([np.repeat(index.vectors[:1], 40, axis=0), index.vectors[3:5]])
    items = [index.items[0]._replace(path=f"{i}.jpg") for i in range(42)]
    many = FaissIndex.build(vectors, items, "")
    found = retriever(toy_model, many, [Path(index.items[0].path)], count=42).find(hidden)
    assert {hit.path for hit in found.hits} <= {"40.jpg", "41.jpg"}


def test_the_next_best_stands_in_with_a_note(toy_model, index, hidden):
    order = brute_force(toy_model, index, hidden)
    Path(order[0]).unlink()
    Path(order[2]).unlink()
    mine = retriever(toy_model, index, count=2, resolve=load_images)
    shown = mine.find(hidden)
    assert [hit.path for hit in shown.hits] == [order[1], order[3]]
    assert [image.size for image in shown.images] == [Image.open(order[i]).size for i in (1, 3)]
    assert [Path(order[i]).name in note for i, note in zip((0, 2), shown.notes, strict=True)] == [True, True]
    again = mine.find(hidden)
    assert [hit.path for hit in again.hits] == order[4:6] and again.notes == []


def test_why_there_is_no_image(toy_model, index, hidden):
    everything = retriever(toy_model, index, count=len(index))
    assert everything.find(hidden).why_empty == "" and everything.find(hidden).why_empty == "none is left"
    for path in {Path(item.path) for item in index.items}:
        path.unlink()
    lost = retriever(toy_model, index, resolve=load_images).find(hidden)
    assert not lost.hits and lost.notes and lost.why_empty == "none of those tried could be opened"


def test_what_is_not_opened_can_be_gone_on_from(toy_model, index, hidden):
    order = brute_force(toy_model, index, hidden)
    mine = retriever(toy_model, index, count=2)
    first, second = mine.find(hidden), mine.find(hidden)
    assert [hit.path for hit in first.hits] == order[:2] and [hit.path for hit in second.hits] == order[2:4]
    assert [hit.path for hit in second.rest] == order[4:], "to the end of the index, and none twice"


def test_without_an_index_there_is_the_embedding(toy_model, hidden):
    shown = retriever(toy_model, None).find(hidden)
    assert shown.hits == [] and shown.embedding.shape == (32,) and "no index" in shown.why_empty
