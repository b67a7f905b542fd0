import json

import pytest
import torch
from PIL import Image

from fromage.errors import UserError
from fromage.images.open import open_image
from fromage.models.vision.registry import load_patches
from fromage.octopus.patch_store import LINES, ROWS, PatchStore


@pytest.fixture(scope="module")
def tower():
    return load_patches("toy")


@pytest.fixture
def images(folder):
    return [str(path) for path in sorted(folder.glob("*.png"))]


def test_rows_are_what_the_tower_says(tower, images, tmp_path):
    store = PatchStore(tmp_path / "store", tower)
    store.add(images[:2], batch_size=2)
    store.add(images)
    again = PatchStore(tmp_path / "store", tower)
    for image in images:
        want = tower(tower.transform(open_image(image))[None])[0].bfloat16()
        torch.testing.assert_close(again[image], want, rtol=0.02, atol=0.02)
    assert (tmp_path / "store" / ROWS).stat().st_size == len(images) * 2 * 16 * 384


@pytest.mark.parametrize("torn", ["line", "row", "rows ahead"])
def test_a_kill_costs_the_last_images_alone(tower, images, tmp_path, torn):
    store = PatchStore(tmp_path / "store", tower)
    store.add(images, batch_size=3)
    lines, rows = tmp_path / "store" / LINES, tmp_path / "store" / ROWS
    if torn == "line":
        lines.write_text(lines.read_text()[:-5])
    elif torn == "row":
        rows.write_bytes(rows.read_bytes()[:-5])
    else:
        lines.write_text("".join(line + "\n" for line in lines.read_text().splitlines()[:3]))
    again = PatchStore(tmp_path / "store", tower)
    kept = set(again.rows)
    assert len(kept) == (3 if torn == "rows ahead" else len(images) - 1)
    again.add(images)
    assert all(torch.equal(again[image], store[image]) for image in kept)
    assert set(again.rows) == set(images) and len({*again.rows.values()}) == len(images)


def test_opening_only_reads_and_a_second_process_finds_the_work_done(tower, images, tmp_path):
    store, other = (PatchStore(tmp_path / "store", tower) for _ in range(2))
    store.add(images)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    PatchStore(tmp_path / "store", tower).add(images[:2])
    assert {path: path.stat().st_mtime_ns for path in written} == written
    size = (tmp_path / "store" / ROWS).stat().st_size
    other.add(images)
    assert other.rows == store.rows and (tmp_path / "store" / ROWS).stat().st_size == size
    assert torch.equal(other[images[-1]], store[images[-1]])


def test_an_image_that_was_replaced_is_encoded_again(tower, images, tmp_path):
    own = tmp_path / "own.png"
    Image.new("RGB", (96, 96), "red").save(own)
    store = PatchStore(tmp_path / "store", tower)
    store.add([str(own), str(tmp_path / "later.png"), *images])
    red, kept = store[str(own)], store[images[0]]
    lines = [json.loads(line) for line in (tmp_path / "store" / LINES).read_text().splitlines()]
    assert lines[0]["stamp"] == [own.stat().st_size, own.stat().st_mtime_ns] and lines[1]["stamp"] is None
    Image.new("RGB", (96, 96), "blue").save(own)
    Image.new("RGB", (96, 96), "red").save(tmp_path / "later.png")
    again = PatchStore(tmp_path / "store", tower)
    again.add([str(own), str(tmp_path / "later.png"), *images])
    assert not torch.equal(again[str(own)], red) and torch.equal(again[str(tmp_path / "later.png")], red)
    assert again.lost == {} and torch.equal(again[images[0]], kept)


def test_lost_images_are_listed_and_not_tried_again_as_they_are(tower, images, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    store = PatchStore(tmp_path / "store", tower)
    store.add([images[0], str(broken), str(tmp_path / "gone.jpg"), images[1]])
    assert store.lost == {str(broken): "broken", str(tmp_path / "gone.jpg"): "missing"}
    again = PatchStore(tmp_path / "store", tower)
    assert again.lost == store.lost and again.rows == {images[0]: 0, images[1]: 1}


def test_another_towers_store_is_refused(tower, images, tmp_path):
    PatchStore(tmp_path / "store", tower)
    with pytest.raises(UserError, match="another tower"):
        PatchStore(tmp_path / "store", load_patches("toy", layer=-3))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="something else"):
        PatchStore(tmp_path / "other", tower)


def test_the_tower_sees_the_whole_image_and_patches_lie_as_in_it(tower):
    wide = Image.new("RGB", (400, 100), "white")
    wide.paste("red", (300, 0, 400, 100))  # at the right edge, which a centre crop would lose
    plain = Image.new("RGB", (400, 100), "white")
    apart = (tower(tower.transform(wide)[None]) - tower(tower.transform(plain)[None]))[0].norm(dim=1).view(tower.grid)
    assert tower.grid == (4, 4) and (apart.argmax(1) == 3).all()


def test_a_layer_that_is_not_there():
    with pytest.raises(UserError, match="no layer 9"):
        load_patches("toy", layer=9)
