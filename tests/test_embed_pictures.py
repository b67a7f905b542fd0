import io
import json

import numpy as np
import pytest
from PIL import Image
from test_index import COLOURS, Model, write_colours
from test_pictures import encoded, make_tar

from fromage.embed_pictures import embed_pictures
from fromage.errors import UserError
from fromage.picture_source import Item


def test_folder_shards_and_stored_features_agree(tmp_path, monkeypatch):
    folder = write_colours(tmp_path / "pictures")
    data = {name: (folder / name / "a.png").read_bytes() for name in COLOURS}
    feature = lambda name: encoded_npy(np.array(COLOURS[name], dtype=np.float16) / 255)  # noqa: E731
    make_tar(tmp_path / "0.tar", {"b.png": data["blue"], "b.txt": b" a blue one\n", "g.npy": feature("green")})
    make_tar(tmp_path / "1.tar", {"r.npy": feature("red"), "r.jpg": b"not read", "r.txt": "rouge é".encode()})
    wanted, found = embed_pictures(Model(), folder)
    assert [item.path for item in found] == [str(folder / name / "a.png") for name in COLOURS]
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path, ".", "{0..1}.tar", str(tmp_path / "*.tar")):
        for batch_size, workers in ((1, 0), (64, 0)):
            embeddings, found = embed_pictures(Model(), source, batch_size, workers)
            np.testing.assert_allclose(embeddings, wanted, atol=1e-6)
            assert found[0] == Item(f"{tmp_path}/0.tar#b", "a blue one")
            assert found[2] == Item(f"{tmp_path}/1.tar#r", "rouge é")
    assert len(embed_pictures(Model(), "0.tar")[0]) == 2


def encoded_npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_workers_change_nothing(tmp_path):
    for i in range(7):
        Image.new("RGB", (4, 4), (i * 30, 200, 90)).save(tmp_path / f"{i}.bmp")
    (tmp_path / "4.bmp").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="4.bmp"):
        alone, found_alone = embed_pictures(Model(), tmp_path, 2, 0)
    with pytest.warns(UserWarning, match="4.bmp"):
        shared, found_shared = embed_pictures(Model(), tmp_path, 2, 2)
    np.testing.assert_array_equal(alone, shared)
    assert found_alone == found_shared


def test_odd_pictures_and_broken_ones(tmp_path):
    red = Image.new("RGB", (40, 30), COLOURS["red"])
    red.convert("CMYK").save(tmp_path / "cmyk.JPG")
    red.convert("P").save(tmp_path / "palette.gif")
    red.convert("P").save(tmp_path / "palette.png")
    red.convert("RGBA").save(tmp_path / "alpha.webp", lossless=True)
    (tmp_path / "._hidden.jpg").write_bytes(b"of another system")
    (tmp_path / "notes.txt").write_text("no picture")
    for i in range(6):
        (tmp_path / f"broken{i}.jpg").write_bytes(encoded(red, "JPEG")[: 100 * i])
    with pytest.warns(UserWarning, match=r"6 of 10 pictures.*broken0.jpg.*broken4.jpg.*\.\.\."):
        embeddings, found = embed_pictures(Model(), tmp_path)
    names = ["alpha.webp", "cmyk.JPG", "palette.gif", "palette.png"]
    assert [item.path for item in found] == [str(tmp_path / name) for name in names]
    np.testing.assert_allclose(embeddings, [[1, 0, 0]] * 4, atol=0.02)


def test_truncated_shard_is_named_and_its_beginning_used(tmp_path):
    png = encoded(Image.effect_noise((32, 32), 50))
    shard = make_tar(tmp_path / "0.tar", {f"{i}.png": png for i in range(9)})
    shard.write_bytes(shard.read_bytes()[: 3 * 2048 + 700])
    with pytest.warns(UserWarning, match="0.tar"):
        embeddings, _ = embed_pictures(Model(), shard)
    assert 1 <= len(embeddings) < 9


def test_nothing_usable(tmp_path):
    with pytest.raises(UserError, match="neither pictures"):
        embed_pictures(Model(), tmp_path)
    with pytest.raises(UserError, match="neither pictures"):
        embed_pictures(Model(), tmp_path / "gone")
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"no usable picture.*a\.jpg"):
        embed_pictures(Model(), tmp_path)
    with pytest.raises(UserError, match=r"0\.tar"):
        embed_pictures(Model(), make_tar(tmp_path / "0.tar", {"a.txt": b"caption alone"}))
    with pytest.raises(UserError, match="7 wide, not 3"):
        embed_pictures(Model(), make_tar(tmp_path / "1.tar", {"a.npy": encoded_npy(np.ones(7))}))


def test_captions_of_a_folder(tmp_path):
    folder = write_colours(tmp_path / "pictures")
    plain = {"red/a.png": "rot", "blue/a.png": ["blau", "noch blauer"], "gone.png": "nichts"}
    coco = {
        "images": [{"id": 4, "file_name": "red/a.png"}, {"id": 7, "file_name": "blue/a.png"}],
        "annotations": [{"image_id": i, "caption": c} for i, c in ((7, "blau"), (4, "rot"), (4, "roter"))],
    }
    for data in (plain, coco):
        (tmp_path / "captions.json").write_text(json.dumps(data))
        _, found = embed_pictures(Model(), folder, captions=tmp_path / "captions.json")
        assert [item.caption for item in found] == ["blau", "", "rot"]


@pytest.mark.parametrize("data", ["{}", "[1]", "{", '{"a.png": []}', '{"annotations": [{}]}', '{"other.png": "text"}'])
def test_bad_captions_are_refused(tmp_path, data):
    (tmp_path / "captions.json").write_text(data)
    with pytest.raises(UserError, match=r"captions\.json"):
        embed_pictures(Model(), write_colours(tmp_path / "pictures"), captions=tmp_path / "captions.json")


def test_captions_are_not_for_shards(tmp_path):
    with pytest.raises(UserError, match="leave out"):
        embed_pictures(Model(), make_tar(tmp_path / "0.tar", {}), captions=tmp_path / "captions.json")
