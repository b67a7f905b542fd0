"""Folders of clip-retrieval and autofaiss become indexes, where the tower is the model's."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_faiss_index import rows

from fromage.cli.main import main
from fromage.retrieval.open_index import load_index, search_index


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve images of shapes and colours of their own."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(12):
        pixels = draw.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def features(model, photos):
    """(12, m) of the model's own tower, at unit length as clip-retrieval stores them."""
    pixels = [model.vision.transform(Image.open(path).convert("RGB")) for path in sorted(photos.iterdir())]
    return torch.nn.functional.normalize(model.vision(torch.stack(pixels)).float(), dim=-1).numpy()


@pytest.fixture
def ckpt(model, monkeypatch, tmp_path):
    monkeypatch.setattr("fromage.models.fromage.load_model", lambda path, device="cpu": model)
    (tmp_path / "a.ckpt").touch()
    return str(tmp_path / "a.ckpt")


def clip_folder(folder, features, paths, column="image_path", dtype=np.float16, **columns):
    """As clip-retrieval leaves it: two parts."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for part, some in enumerate((slice(0, 5), slice(5, None))):
        np.save(folder / "img_emb" / f"img_emb_{part}.npy", features[some].astype(dtype))
        table = pa.table({column: paths[some], **{name: values[some] for name, values in columns.items()}})
        pq.write_table(table, folder / "metadata" / f"metadata_{part}.parquet")
    return folder


def test_a_folder_of_clip_retrieval_becomes_an_index_with_its_metadata(ckpt, model, photos, features, tmp_path):
    names = [path.name for path in sorted(photos.iterdir())]
    said = {
        "caption": [f"photo {i}" for i in range(12)],
        "key": [f"{i:05d}" for i in range(12)],
        "NSFW": [i / 12 for i in range(12)],
    }
    for number, paths in enumerate((names, [str(photos / name) for name in names])):
        clip = clip_folder(tmp_path / f"clip{number}", features, paths, **said)
        out = str(tmp_path / f"index{number}")
        assert main(["index", "import", str(clip), "--ckpt", ckpt, "--images", str(photos), "--out", out]) == 0
        index = load_index(out, model.fingerprint())
        assert [item.path for item in index.items] == [str(photos / name) for name in names]
        assert index.items[3].caption == "photo 3" and index.metadata.kinds["NSFW"] == "double"
        found = search_index(model, index, [Image.open(photos / "07.png")], 3)[0]
        assert Path(found[0].path).name == "07.png" and found[0].metadata["key"] == "00007" and found[0].score > 0.98
        assert len(index.search(rows(1, q=32), 12, where="NSFW < 0.5")[0]) == 6


def test_parquet_with_embeddings_and_rows_of_the_retrieval_space(ckpt, model, photos, tmp_path):
    paths = [path.name for path in sorted(photos.iterdir())]
    pixels = [model.vision.transform(Image.open(photos / name).convert("RGB")) for name in paths]
    with torch.no_grad():
        own = model.embed_images(model.vision(torch.stack(pixels))).numpy()
    (tmp_path / "auto").mkdir()
    pq.write_table(pa.table({"path": [*paths, paths[0]], "embedding": [*own, own[0]]}), tmp_path / "auto" / "0.parquet")
    out = str(tmp_path / "index")
    assert main(["index", "import", str(tmp_path / "auto"), "--ckpt", ckpt, "--images", str(photos), "--out", out]) == 0
    index = load_index(out)
    np.testing.assert_allclose(index.vectors[:12], own, atol=1e-5)


def told(capsys, *words):
    assert main(["index", "import", *map(str, words)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


def test_embeddings_that_do_not_match_are_refused_in_one_line(ckpt, photos, features, tmp_path, capsys):
    names = [path.name for path in sorted(photos.iterdir())]
    how = "--ckpt", ckpt, "--out", tmp_path / "out"
    noise = clip_folder(tmp_path / "noise", rows(12, q=features.shape[1]), names)
    assert "are like those of this checkpoint by a cosine of" in told(capsys, noise, *how, "--images", photos)
    shuffled = clip_folder(tmp_path / "shuffled", features[::-1], names)
    assert "of another tower" in told(capsys, shuffled, *how, "--images", photos)
    wide = clip_folder(tmp_path / "wide", rows(12, q=7), names)
    assert "are 7 wide, the tower's features" in told(capsys, wide, *how, "--images", photos)
    good = clip_folder(tmp_path / "good", features, names)
    assert "name their folder by --images" in told(capsys, good, *how)
    assert "import it alone" in told(capsys, good, noise, *how)
    outside = clip_folder(tmp_path / "outside", features, [str(photos / name) for name in names])
    (tmp_path / "empty").mkdir()
    assert "none of its images can be opened" in told(capsys, outside, *how, "--images", tmp_path / "empty")
    assert "holds neither img_emb/*.npy" in told(capsys, tmp_path / "empty", *how)
    odd = clip_folder(tmp_path / "odd", features, names, column="where")
    assert "have no column image_path, path or url" in told(capsys, odd, *how)
    (good / "metadata" / "metadata_1.parquet").unlink()
    assert "2 files in img_emb and 1 in metadata" in told(capsys, good, *how)
    np.save(noise / "img_emb" / "img_emb_0.npy", np.array([{}], object), allow_pickle=True)
    assert "img_emb_0.npy: holds no embeddings" in told(capsys, noise, *how, "--images", photos)
    pq.write_table(pa.table({"image_path": names[:4]}), wide / "metadata" / "metadata_0.parquet")
    assert "4 rows for 5 embeddings" in told(capsys, wide, *how, "--images", photos)
    ragged = [row.tolist() for row in features]
    ragged[3], ragged[9] = ragged[3][:-1], [*ragged[9], ragged[3][-1]]  # as many numbers in all
    (tmp_path / "auto").mkdir()
    pq.write_table(pa.table({"path": names, "embedding": ragged}), tmp_path / "auto" / "0.parquet")
    assert "rows of different lengths" in told(capsys, tmp_path / "auto", *how, "--images", photos)
    assert not (tmp_path / "out").exists()
