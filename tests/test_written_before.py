"""What was written before the packages were moved is still read: one of each, in fixtures/written_before.

The models are on the toy towers with k = 1, q = 4 and a visual prefix that is zero but for its first row, which packs well.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fromage.data.features import check_features, store_features
from fromage.data.image_source import Item
from fromage.data.sample_images import from_npy
from fromage.data.shard_names import expand
from fromage.data.shard_writer import write_shards
from fromage.data.shards import read_shard
from fromage.errors import UserError
from fromage.images.codec import to_png
from fromage.models.fromage import Fromage, load_model
from fromage.models.vision.registry import load_patches
from fromage.octopus.patch_store import PatchStore
from fromage.retrieval.build import add, remove, trust
from fromage.retrieval.embedding_store import EmbeddingStore
from fromage.retrieval.faiss_index import FaissIndex
from fromage.retrieval.open_index import load_index
from fromage.training.checkpoint_io import SafeCheckpointIO

BEFORE = Path(__file__).parent / "fixtures" / "written_before"
# as they were then; the latter's in bfloat16
FINGERPRINTS = {"checkpoint": "a9d465ba60c8a529", "model_folder": "c6c26e632df6690b"}
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


@pytest.fixture
def copied(tmp_path):
    """Copies a fixture, or unpacks it, where a test may change it."""

    def copy(name):
        if (BEFORE / f"{name}.tar.gz").exists():
            with tarfile.open(BEFORE / f"{name}.tar.gz") as tar:
                tar.extractall(tmp_path, filter="data")
        else:
            shutil.copytree(BEFORE / name, tmp_path / name)
        return tmp_path / name

    return copy


def rows(n, q):
    made = np.random.default_rng(0).normal(size=(n, q)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def items(n):
    return [Item(f"/p/{i}.jpg", f"picture {i}" if i else "naïve") for i in range(n)]


@pytest.mark.parametrize(("name", "n", "q", "kind"), [("index_flat", 12, 4, "flat"), ("index_ivf", 60, 8, "IVF4,SQ8")])
def test_an_index(copied, name, n, q, kind):
    folder = copied(name)
    assert "backend" not in json.loads((folder / "index.json").read_text())
    index = trust(folder)  # which has no seal yet; before it, FAISS's file is not read
    assert (index.kind, index.checkpoint, len(index), len(index.texts)) == (kind, "runs/a.ckpt", n, 9 * (kind != "flat"))
    flat, queries = FaissIndex.build(rows(n, q), items(n), "f00d"), rows(n, q)
    assert np.array_equal(index.vectors, rows(n, q)) and index.items == items(n)
    found, true = ([[hit.path for hit in hits] for hits in each.search(queries, 5)] for each in (index, flat))
    assert found == true if kind == "flat" else [paths[0] for paths in found] == [paths[0] for paths in true]
    assert kind == "flat" or (index.candidates.recall >= 0.9 and index.candidates.text_recall >= 0.9)
    assert len(remove(folder, ["/p/3.jpg"])) == n - 1
    assert json.loads((folder / "index.json").read_text())["backend"] == "faiss" and len(load_index(folder)) == n - 1


def test_an_index_without_a_seal_finds_the_same(copied):
    folder = copied("index_ivf")
    with pytest.warns(UserWarning, match="fromage index trust"):
        index = load_index(folder, "f00d")
    assert index.kind == "IVF4,SQ8" and index.items == items(60)
    flat = FaissIndex.build(rows(60, 8), items(60), "f00d")
    found, true = ([[hit.path for hit in hits] for hits in each.search(rows(9, 8), 5)] for each in (index, flat))
    assert found == true


def test_embeddings(copied):
    store = EmbeddingStore.open(copied("embeddings"))
    assert store.missing() == [1] and store.broken() == ["/p/broken.jpg: broken"]
    about = {name: value for name, value in store.about.items() if name not in ("format", "version")}
    again = EmbeddingStore.begin(store.folder, **about | {"checkpoint": "moved.ckpt"})
    again.write(1, rows(12, 4)[7:], items(12)[7:], [])
    found = np.concatenate([vectors for vectors, _ in again.batches()])
    assert np.array_equal(found, rows(12, 4).astype(np.float16).astype(np.float32))
    assert len(add(copied("index_flat"), again)) == 12


def test_features(copied, tmp_path):
    """Features of the toy tower, of images of one colour each."""
    folder, vision = copied("features"), Fromage.load(k=1, q=4).vision
    check_features(str(folder), vision)
    images = [
        (f"k{i}", to_png(Image.new("RGB", (64, 64), colour)), f"number {i}", {"n": i}) for i, colour in enumerate(COLOURS)
    ]
    write_shards(images, tmp_path / "shards", per_shard=2)
    for made in folder.glob("*.tar"):
        made.touch()  # features are not older than their shards
    assert store_features(str(tmp_path / "shards"), folder, vision, workers=0) == 0, "all are there"
    store_features(str(tmp_path / "shards"), tmp_path / "again", vision, workers=0)
    for before, again in zip(expand(str(folder)), expand(str(tmp_path / "again")), strict=True):
        for one, other in zip(read_shard(before, print), read_shard(again, print), strict=True):
            assert (one["__key__"], one["txt"], one["json"]) == (other["__key__"], other["txt"], other["json"])
            torch.testing.assert_close(from_npy(one["npy"]), from_npy(other["npy"]), rtol=0, atol=1e-4)


def test_patches(copied, tmp_path, monkeypatch):
    tower, folder = load_patches("toy"), copied("patches")
    store = PatchStore(folder, tower)
    want = tower(tower.transform(Image.new("RGB", (64, 64), "red"))[None])[0].bfloat16()  # (P, m)
    torch.testing.assert_close(store["red.png"], want, rtol=0.02, atol=0.02)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "blue").save("blue.png")
    kept = store["red.png"]
    store.add(["blue.png"])
    again = PatchStore(folder, tower)
    assert again.rows == {"red.png": 0, "blue.png": 1} and torch.equal(again["red.png"], kept)


def test_a_folder_of_parameters(copied):
    folder = copied("model_folder")
    model = load_model(folder)
    assert model.fingerprint() == FINGERPRINTS["model_folder"] and (model.k, model.q) == (1, 4)
    model.save_pretrained(folder)
    assert load_model(folder).fingerprint() == FINGERPRINTS["model_folder"]


def test_a_checkpoint(copied):
    path = copied("checkpoint") / "last.ckpt"
    model = load_model(path)
    assert model.fingerprint() == FINGERPRINTS["checkpoint"] and (model.k, model.q) == (1, 4)
    assert SafeCheckpointIO().load_checkpoint(path)["hyper_parameters"]["lr"] == 3e-4


def test_what_another_model_wrote_is_refused(copied):
    with pytest.raises(UserError, match=r"f00d.*not with beef"):
        load_index(copied("index_flat"), "beef")
    with pytest.raises(UserError, match="another tower"):
        PatchStore(copied("patches"), load_patches("toy", layer=-3))
