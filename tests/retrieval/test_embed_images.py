import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import colour_tower
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_codec import encoded, make_tar
from test_faiss_index import COLOURS, Model, write_colours

from fromage.data import image_source as image_source
from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.retrieval import embed_images as module
from fromage.retrieval.embedding_store import EmbeddingStore
from fromage.retrieval.item_table import ItemTable


def rows_and_items(store):
    batches = list(store.batches())
    return np.concatenate([rows for rows, _ in batches]), list(ItemTable([items for _, items in batches]))


def embed_images(model, source, **options):
    """Embed into a new folder, and read it."""
    with tempfile.TemporaryDirectory() as folder:
        return rows_and_items(module.embed_images(model, source, folder, **options))


def test_the_key_of_an_image_in_a_shard_is_behind_the_last_of_several_shards_in_its_name(tmp_path):
    about = {"fingerprint": "f00d", "checkpoint": "", "source": "", "width": 2, "dtype": "float32", "parts": 1}
    store = EmbeddingStore.begin(tmp_path / "out", **about)
    items = [Item("/a/0.tar#k"), Item("/a/0.tar#b/1.tar#k2"), Item("/a/red.one.jpg"), Item("https://a.example/0.tar#k3")]
    store.write(0, np.eye(2, dtype=np.float32)[[0, 1, 0, 1]], items, [])
    keys = pq.read_table(tmp_path / "out" / "00000.parquet").column("key").to_pylist()
    assert keys == ["k", "k2", "red.one", "k3"]


def test_folder_shards_and_stored_features_agree(tmp_path, monkeypatch):
    folder = write_colours(tmp_path / "images")
    data = {name: (folder / name / "a.png").read_bytes() for name in COLOURS}
    feature = lambda name: encoded_npy(np.array(COLOURS[name], dtype=np.float16) / 255)  # noqa: E731
    shards = tmp_path / "shards"
    shards.mkdir()
    make_tar(shards / "0.tar", {"b.png": data["blue"], "b.txt": b" a blue one\n", "g.npy": feature("green")})
    make_tar(shards / "1.tar", {"r.npy": feature("red"), "r.jpg": b"not read", "r.txt": "rouge é".encode()})
    wanted, found = embed_images(Model(), folder)
    assert [item.path for item in found] == [str(folder / name / "a.png") for name in COLOURS]
    monkeypatch.chdir(shards)
    for source in (shards, ".", "{0..1}.tar", str(shards / "*.tar")):
        for batch_size, workers in ((1, 0), (64, 0)):
            embeddings, found = embed_images(Model(), source, batch_size=batch_size, workers=workers)
            np.testing.assert_allclose(embeddings, wanted, atol=1e-6)
            assert found[0] == Item(f"{shards}/0.tar#b", "a blue one")
            assert found[2] == Item(f"{shards}/1.tar#r", "rouge é")
    assert len(embed_images(Model(), "0.tar")[0]) == 2
    (shards / "red.png").write_bytes(data["red"])
    with pytest.raises(UserError, match=r"holds images and \.tar shards"):
        embed_images(Model(), shards)


def encoded_npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_workers_change_nothing(tmp_path):
    for i in range(7):
        Image.new("RGB", (4, 4), (i * 30, 200, 90)).save(tmp_path / f"{i}.bmp")
    (tmp_path / "4.bmp").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="4.bmp"):
        alone, found_alone = embed_images(Model(), tmp_path, batch_size=2, workers=0)
    with pytest.warns(UserWarning, match="4.bmp"):
        shared, found_shared = embed_images(Model(), tmp_path, batch_size=2, workers=2)
    np.testing.assert_array_equal(alone, shared)
    assert found_alone == found_shared


def test_odd_images_and_broken_ones(tmp_path):
    red = Image.new("RGB", (40, 30), COLOURS["red"])
    red.convert("CMYK").save(tmp_path / "cmyk.JPG")
    red.convert("P").save(tmp_path / "palette.gif")
    red.convert("P").save(tmp_path / "palette.png")
    red.convert("RGBA").save(tmp_path / "alpha.webp", lossless=True)
    (tmp_path / "._hidden.jpg").write_bytes(b"of another system")
    (tmp_path / "notes.txt").write_text("no image")
    for i in range(6):
        (tmp_path / f"broken{i}.jpg").write_bytes(encoded(red, "JPEG")[: 100 * i])
    with pytest.warns(UserWarning, match=r"6 of 10 images.*broken0.jpg.*broken2.jpg.*and 3 more"):
        embeddings, found = embed_images(Model(), tmp_path)
    names = ["alpha.webp", "cmyk.JPG", "palette.gif", "palette.png"]
    assert [item.path for item in found] == [str(tmp_path / name) for name in names]
    np.testing.assert_allclose(embeddings, [[1, 0, 0]] * 4, atol=0.02)


def test_truncated_shard_is_named_and_its_beginning_used(tmp_path):
    png = encoded(Image.effect_noise((32, 32), 50))
    shard = make_tar(tmp_path / "0.tar", {f"{i}.png": png for i in range(9)})
    shard.write_bytes(shard.read_bytes()[: 3 * 2048 + 700])
    with pytest.warns(UserWarning, match="0.tar"):
        embeddings, _ = embed_images(Model(), shard)
    assert 1 <= len(embeddings) < 9


def test_nothing_usable(tmp_path):
    with pytest.raises(UserError, match="neither images"):
        embed_images(Model(), tmp_path)
    with pytest.raises(UserError, match="neither images"):
        embed_images(Model(), tmp_path / "gone")
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"no usable image.*a\.jpg"):
        embed_images(Model(), tmp_path)
    with pytest.raises(UserError, match=r"0\.tar"):
        embed_images(Model(), make_tar(tmp_path / "0.tar", {"a.txt": b"caption alone"}))
    with pytest.raises(UserError, match="7 wide, not 3"):
        embed_images(Model(), make_tar(tmp_path / "1.tar", {"a.npy": encoded_npy(np.ones(7))}))


def test_stored_features_of_another_width_are_left_out(tmp_path):
    shard = make_tar(tmp_path / "0.tar", {f"{i}.npy": encoded_npy(np.ones(5 if i == 2 else 3)) for i in range(4)})
    with pytest.warns(UserWarning, match=r"1 of 4 images.*0\.tar#2: features 5 wide, not 3"):
        embeddings, found = embed_images(Model(), shard)
    assert len(embeddings) == 3 and [item.path[-2:] for item in found] == ["#0", "#1", "#3"]


def test_captions_of_a_folder(tmp_path):
    folder = write_colours(tmp_path / "images")
    plain = {"red/a.png": "rot", "blue/a.png": ["blau", "noch blauer"], "gone.png": "nichts"}
    coco = {
        "images": [{"id": 4, "file_name": "red/a.png"}, {"id": 7, "file_name": "blue/a.png"}],
        "annotations": [{"image_id": i, "caption": c} for i, c in ((7, "blau"), (4, "rot"), (4, "roter"))],
    }
    for data in (plain, coco):
        (tmp_path / "captions.json").write_text(json.dumps(data))
        _, found = embed_images(Model(), folder, captions=tmp_path / "captions.json")
        assert [item.caption for item in found] == ["blau", "", "rot"]


def test_captions_that_came_later_or_were_corrected_are_not_passed_over(tmp_path, monkeypatch):
    folder, out, said = write_colours(tmp_path / "images"), tmp_path / "e", tmp_path / "captions.json"
    monkeypatch.setattr(image_source, "FILES_PER_PART", 1)
    for captions, again in ((None, 3), ({"red/a.png": "rot"}, 1), ({"red/a.png": "roter"}, 1), ({"red/a.png": "roter"}, 0)):
        said.write_text(json.dumps(captions or {}))
        model = Model()
        monkeypatch.setattr(model, "embed_images", counting := Counting(model.embed_images))
        store = module.embed_images(model, folder, out, captions=said if captions else None)
        assert counting.rows == again
        assert sorted(item.caption for item in rows_and_items(store)[1]) == sorted(
            ["", "", *(captions or {"": ""}).values()]
        )
    Image.new("RGB", (8, 8), "red").save(folder / "new.png")
    said.write_text(json.dumps({"red/a.png": "roter", "new.png": "neu"}))
    assert len(module.embed_images(Model(), folder, out, captions=said)) == 4, "a folder grows, and its captions with it"


class Counting:
    """A function, and how many rows it was given."""

    def __init__(self, function):
        self.function, self.rows = function, 0

    def __call__(self, rows):
        self.rows += len(rows)
        return self.function(rows)


@pytest.mark.parametrize(
    ("name", "value"), [("root", "x"), ("root", "/a\0"), ("root", 5), ("checkpoint", 5), ("root", "/\ud800")]
)
def test_paths_that_cannot_be_are_refused_where_the_store_is_opened(tmp_path, name, value):
    module.embed_images(Model(), write_colours(tmp_path / "images"), tmp_path / "e")
    file = tmp_path / "e" / "embeddings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(UserError, match=f"embeddings.json: {name} is "):
        EmbeddingStore.open(tmp_path / "e")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.tsv", "blau\tblue/a.png\nrot\t./red/a.png\nroter\tred/a.png\n"),
        ("c.jsonl", '{"image": "blue/a.png", "captions": ["blau", "b"]}\n{"file_name": "red/a.png", "text": "rot"}\n'),
    ],
)
def test_captions_of_a_folder_as_they_are_packed(tmp_path, name, text):
    folder = write_colours(tmp_path / "images")
    (tmp_path / name).write_text(text)
    _, found = embed_images(Model(), folder, captions=tmp_path / name)
    assert [item.caption for item in found] == ["blau", "", "rot"]
    with pytest.raises(UserError, match="cannot be read"):
        embed_images(Model(), folder, captions=tmp_path / f"none.{name}")
    (tmp_path / name).write_text("junk\n" + text)
    with pytest.raises(UserError, match=r"1 of 4 entries are odd \(line 1"):
        embed_images(Model(), folder, captions=tmp_path / name)


@pytest.mark.parametrize("data", ["{}", "[1]", "{", '{"a.png": []}', '{"annotations": [{}]}', '{"other.png": "text"}'])
def test_bad_captions_are_refused(tmp_path, data):
    (tmp_path / "captions.json").write_text(data)
    with pytest.raises(UserError, match=r"captions\.json"):
        embed_images(Model(), write_colours(tmp_path / "images"), captions=tmp_path / "captions.json")


def test_captions_are_not_for_shards(tmp_path):
    with pytest.raises(UserError, match="leave out"):
        embed_images(Model(), make_tar(tmp_path / "0.tar", {}), captions=tmp_path / "captions.json")


# --- what is stored, and how a run goes on ------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Eleven images, one of them broken, in parts of two."""
    monkeypatch.setattr(image_source, "FILES_PER_PART", 2)
    (tmp_path / "images").mkdir()
    for i in range(11):
        Image.new("RGB", (4, 4), (i * 20, 200, 90)).save(tmp_path / "images" / f"{i:02}.bmp")
    (tmp_path / "images" / "04.bmp").write_bytes(b"broken")
    return tmp_path / "images"


@pytest.mark.filterwarnings("ignore:.*04.bmp")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_stored(images, tmp_path, dtype):
    store = module.embed_images(Model(), images, tmp_path / "out", checkpoint="a.ckpt", dtype=dtype)
    assert (len(store), store.about["parts"], store.missing()) == (10, 6, [])
    assert [line.split(":")[0] for line in store.broken()] == [str(images / "04.bmp")]
    table = pq.read_table(tmp_path / "out" / "00001.parquet")
    assert table.schema.metadata[b"fingerprint"] == b"f00d"
    assert str(table.schema.field("embedding").type).endswith({"float32": "float>[3]", "float16": "halffloat>[3]"}[dtype])
    assert table.column("key").to_pylist() == ["02", "03"]
    assert table.column("path").to_pylist() == [str(images / f"{i:02}.bmp") for i in (2, 3)]
    np.testing.assert_allclose(np.stack(table.column("embedding").to_numpy()), rows_and_items(store)[0][2:4])


class Killed(BaseException):
    """Stands for the signal that ends a process in the middle."""


@pytest.mark.filterwarnings("ignore:.*04.bmp")
@pytest.mark.parametrize("step", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("where", ["write_table", "model"])
def test_a_run_that_was_stopped_goes_on(images, tmp_path, monkeypatch, step, where):
    wanted = rows_and_items(module.embed_images(Model(), images, tmp_path / "whole", batch_size=1))
    calls = []

    def counted(original):
        def call(*args):
            calls.append(args)
            if len(calls) > step:
                raise Killed
            return original(*args)

        return call

    def torn(table, path):
        original(table, path)
        os.truncate(path, 100)

    original = pq.write_table
    with monkeypatch.context() as patch:
        if where == "model":
            patch.setattr(Model, "embed_images", counted(Model.embed_images))
        else:
            patch.setattr("fromage.retrieval.embedding_store.pq.write_table", counted(original if step % 2 else torn))
        try:
            module.embed_images(Model(), images, tmp_path / "out", batch_size=1)
        except (Killed, UserError):
            assert len(calls) <= step + 1
    for path in (tmp_path / "out").glob("*.parquet"):  # what a power cut can leave; the message says to remove it
        if path.stat().st_size == 100:
            path.unlink()
    again = []
    embed = Model.embed_images
    monkeypatch.setattr(Model, "embed_images", lambda *args: again.append(1) or embed(*args))
    rows, items = rows_and_items(module.embed_images(Model(), images, tmp_path / "out", batch_size=1))
    np.testing.assert_array_equal(rows, wanted[0])
    assert items == wanted[1]
    if where == "model" and step == 8:
        assert len(again) == 10 - 7  # four whole parts, one of them with the broken image, are not done again
    assert not list((tmp_path / "out").glob(".*"))


RUN = """
import sys
sys.path[:0] = {path!r}
from colour_tower import Model
from fromage.retrieval import embed_images as embed_images
from fromage.data import image_source as image_source
image_source.FILES_PER_PART = 2
print("ready", flush=True)
embed_images.embed_images(Model(0.03), {source!r}, {out!r}, batch_size=1, workers=2)
"""


@pytest.mark.filterwarnings("ignore:.*04.bmp")
def test_a_killed_process_loses_and_doubles_nothing(images, tmp_path):
    model = colour_tower.Model()  # which another process imports at once
    wanted = rows_and_items(module.embed_images(model, images, tmp_path / "whole", batch_size=1))
    out, rng = tmp_path / "out", random.Random(0)
    script = RUN.format(path=sys.path, source=str(images), out=str(out))
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    rows, items = rows_and_items(module.embed_images(model, images, out, batch_size=1))
    np.testing.assert_array_equal(rows, wanted[0])
    assert items == wanted[1]


@pytest.mark.filterwarnings("ignore:.*04.bmp")
def test_a_store_of_something_else_is_refused(images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    module.embed_images(Model(), images, out)
    with pytest.raises(UserError, match=r"dtype .float32. there, .float16. here"):
        module.embed_images(Model(), images, out, dtype="float16")
    with pytest.raises(UserError, match="float32 or float16"):
        module.embed_images(Model(), images, out, dtype="int8")
    with monkeypatch.context() as patch:
        patch.setattr(Model, "fingerprint", lambda self: "beef")
        with pytest.raises(UserError, match=r"fingerprint .f00d. there, .beef. here"):
            module.embed_images(Model(), images, out)
    shutil.copytree(images, tmp_path / "others")
    with pytest.raises(UserError, match="another run"):
        module.embed_images(Model(), tmp_path / "others", out)
    with pytest.raises(UserError, match="something else than embeddings"):
        module.embed_images(Model(), images, images)


@pytest.mark.filterwarnings("ignore:.*04.bmp")
@pytest.mark.parametrize(("batch_size", "workers"), [(0, 0), (-1, 0), (1, -1)])
def test_batches_and_workers_that_cannot_be(images, tmp_path, batch_size, workers):
    with pytest.raises(UserError, match=r"(batch_size|workers) is .*whole number from"):
        module.embed_images(Model(), images, tmp_path / "out", batch_size=batch_size, workers=workers)
    assert not (tmp_path / "out").exists()


def test_images_beside_shards_are_not_passed_over(images, tmp_path):
    (images / "z.tar").touch()
    with pytest.raises(UserError, match=r"holds images and \.tar shards"):
        module.embed_images(Model(), images, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:.*04.bmp")
def test_when_it_is_stopped_it_says_that_the_command_goes_on(images, tmp_path, monkeypatch):
    def stopped(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", stopped)
    with pytest.raises(KeyboardInterrupt, match="goes on"):
        module.embed_images(Model(), images, tmp_path / "out")


def test_a_store_that_cannot_be_written_says_so(images, tmp_path, disk):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file is in the way"):
        module.embed_images(Model(), images, tmp_path / "file" / "out")
    disk(1000)
    kept = r"00000\.parquet: cannot be written \(File too large\); parts .* are kept, and the same command goes on"
    with pytest.raises(UserError, match=kept):
        module.embed_images(Model(), images, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["embeddings.json"]


def test_a_store_that_another_process_adds_to_is_refused(images, tmp_path, other_writer):
    pid = other_writer(tmp_path / "out")
    with pytest.raises(UserError, match=f"out: is in use by process {pid}"):
        module.embed_images(Model(), images, tmp_path / "out")


def test_a_store_that_is_not_whole_is_refused(images, tmp_path):
    out = tmp_path / "out"
    store = module.embed_images(Model(), images, out)
    part = out / "00002.parquet"
    data = part.read_bytes()
    part.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"00002\.parquet: is damaged"):
        list(EmbeddingStore.open(out).batches())
    part.unlink()
    with pytest.raises(UserError, match=r"5 of 6 parts.*again to finish"):
        list(store.batches())
    other = module.embed_images(Model(), images, tmp_path / "other")
    other.about["fingerprint"] = "beef"
    other.write(2, np.zeros((0, 3), np.float32), [], [])
    part.write_bytes((tmp_path / "other" / "00002.parquet").read_bytes())
    with pytest.raises(UserError, match="another model"):
        list(store.batches())
    for text in ("[]", "{", '{"format": "fromage-embeddings", "version": 1}'):
        (out / "embeddings.json").write_text(text)
        with pytest.raises(UserError, match="cannot be read as embeddings"):
            EmbeddingStore.open(out)


def test_when_nothing_was_usable_the_next_run_begins_anew(tmp_path):
    (tmp_path / "images").mkdir()
    image = tmp_path / "images" / "a.png"
    image.write_bytes(b"broken")
    with pytest.raises(UserError, match="no usable"):
        module.embed_images(Model(), tmp_path / "images", tmp_path / "out")
    Image.new("RGB", (4, 4), (255, 0, 0)).save(image)
    assert len(module.embed_images(Model(), tmp_path / "images", tmp_path / "out")) == 1


@pytest.mark.filterwarnings("ignore:.*04.bmp")
@pytest.mark.parametrize("stamped", [True, False])
def test_a_folder_that_has_grown_is_gone_on_with(images, tmp_path, monkeypatch, stamped):
    """New files are embedded alone; parts with a file that has changed or gone are embedded again, the others are not."""
    out, names = tmp_path / "out", sorted(path.name for path in images.iterdir())
    if not stamped:  # as former versions stored parts
        write = EmbeddingStore.write
        monkeypatch.setattr(EmbeddingStore, "write", lambda self, *args: write(self, *args[:4]))
    module.embed_images(Model(), images, out)
    monkeypatch.undo()
    monkeypatch.setattr(image_source, "FILES_PER_PART", 2)
    kept = {path.name: path.read_bytes() for path in out.glob("*.parquet")}
    for name in ("00a.bmp", "98.bmp", "99.bmp"):
        (images / name).write_bytes((images / names[0]).read_bytes())
    (images / names[2]).unlink()
    if stamped:
        (images / names[6]).write_bytes((images / names[0]).read_bytes())
    seen, embed = [], Model.embed_images
    monkeypatch.setattr(Model, "embed_images", lambda self, rows: seen.append(len(rows)) or embed(self, rows))
    rows, items = rows_and_items(module.embed_images(Model(), images, out, batch_size=1))
    good = [path.name for path in sorted(images.iterdir()) if path.name != "04.bmp"]
    assert sorted(Path(item.path).name for item in items) == good
    there = {path.name: path.read_bytes() for path in out.glob("*.parquet")}
    assert sum(there.get(name) == data for name, data in kept.items()) == len(kept) - 1 - stamped
    assert sum(seen) == 3 + 1 + 2 * stamped, "the new, and what shared a part with the gone and the changed"
    wanted = dict(
        zip(*reversed(rows_and_items(module.embed_images(Model(), images, tmp_path / "again", batch_size=1))), strict=True)
    )
    for item, row in zip(items, rows, strict=True):
        np.testing.assert_array_equal(row, next(r for i, r in wanted.items() if i.path == item.path))
    seen.clear()
    module.embed_images(Model(), images, out, batch_size=1)
    assert not seen, "nothing is left to do"


def test_shards_that_have_come_are_gone_on_with(tmp_path, monkeypatch):
    from fromage.data.shard_writer import write_shards
    from fromage.images.codec import to_png

    def shards(*numbers):
        for n in numbers:
            folder = tmp_path / f"made{n}"
            image = to_png(Image.new("RGB", (4, 4), (9 * n, 9, 9)))
            write_shards([(f"k{n}", image, f"number {n}", {"n": n, "url": "https://images.example"})], folder)
            (tmp_path / "shards").mkdir(exist_ok=True)
            (folder / "00000.tar").rename(tmp_path / "shards" / f"{n:05d}.tar")

    shards(1, 3)
    module.embed_images(Model(), tmp_path / "shards", tmp_path / "out")
    shards(2)
    seen, embed = [], Model.embed_images
    monkeypatch.setattr(Model, "embed_images", lambda self, rows: seen.append(len(rows)) or embed(self, rows))
    _, items = rows_and_items(module.embed_images(Model(), tmp_path / "shards", tmp_path / "out"))
    assert seen == [1] and [item.caption for item in items] == ["number 1", "number 3", "number 2"]
    assert json.loads(items[2].meta)["n"] == 2


def colour_shards(folder, *names):
    """A shard of one image for each name."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        make_tar(folder / f"{name}.tar", {f"{name}.png": encoded(Image.new("RGB", (4, 4), (40 * i, 9, 9)))})
    return folder


def counted(monkeypatch):
    """The numbers of images that are embedded from now on, by step."""
    seen, embed = [], Model.embed_images
    monkeypatch.setattr(Model, "embed_images", lambda self, rows: seen.append(len(rows)) or embed(self, rows))
    return seen


def test_other_shards_of_the_same_folder_are_another_source(tmp_path):
    folder = colour_shards(tmp_path / "shards", "train-0", "train-1", "val-0")
    module.embed_images(Model(), folder / "train-*.tar", tmp_path / "out")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="another run"):
        module.embed_images(Model(), folder / "val-*.tar", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == kept


@pytest.mark.parametrize("former", [False, True])
def test_shards_may_be_named_from_another_folder_when_a_run_is_resumed(tmp_path, monkeypatch, former):
    folder = colour_shards(tmp_path / "shards", "0", "1")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        if former:  # which kept the names as they were given
            find = module.find_images

            def relative(*args):
                images = find(*args)
                return images.only([("shards/0.tar",), ("shards/1.tar",)], [0, 1], images.count)

            patch.setattr(module, "find_images", relative)
            patch.setattr(image_source, "locator", lambda shard, key: f"{Path(shard).absolute()}#{key}")
        module.embed_images(Model(), "shards/*.tar", "out")
    seen = counted(monkeypatch)
    monkeypatch.chdir(folder)
    for source in (folder, "*.tar"):
        _, found = rows_and_items(module.embed_images(Model(), source, tmp_path / "out"))
        assert [item.path for item in found] == [f"{folder}/0.tar#0", f"{folder}/1.tar#1"] and not seen


def test_a_source_that_has_lost_shards_is_gone_on_with(tmp_path, monkeypatch):
    folder = colour_shards(tmp_path / "shards", "0", "1", "2")
    module.embed_images(Model(), folder, tmp_path / "out")
    seen = counted(monkeypatch)
    for lost in ("0", "1"):
        (folder / f"{lost}.tar").unlink()
        for _ in range(2):
            _, found = rows_and_items(module.embed_images(Model(), folder, tmp_path / "out"))
            assert [Path(item.path).name for item in found] == ["1.tar#1", "2.tar#2"][int(lost) :] and not seen
    images = {f"{i}.png": encoded(Image.new("RGB", (8, 8), colour)) for i, colour in enumerate(("red", "blue"), 2)}
    make_tar(folder / "2.tar", images)
    assert len(module.embed_images(Model(), folder, tmp_path / "out")) == 2, "an empty part stands for no shard"


def test_a_file_that_could_not_be_read_is_read_again(tmp_path, monkeypatch):
    """Neither its size nor its time of change shows that the disk is sound again."""
    folder = write_colours(tmp_path / "images")
    (folder / "odd.png").write_bytes(b"no image")
    real = image_source.open_regular

    def fails(path):
        if path.parent.name == "red":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(image_source, "open_regular", fails)
        with pytest.warns(UserWarning, match=r"2 of 4 images .*red/a\.png: .*Input/output error"):
            assert len(module.embed_images(Model(), folder, tmp_path / "e")) == 2
    seen = counted(monkeypatch)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"1 of 4 images .*odd\.png"):
            assert len(module.embed_images(Model(), folder, tmp_path / "e")) == 3
    assert sum(seen) == 3, "what cannot be decoded is done"


def test_a_file_that_may_not_be_read_holds_nothing_up(tmp_path, monkeypatch):
    """Its part is not embedded again at each call, nor before the parts that are missing."""
    folder, closed = write_colours(tmp_path / "images"), tmp_path / "images" / "red"
    allowed, real = os.access, image_source.open_regular

    def fails(path):
        return real(path) if path.parent != closed else _refuse(path)

    monkeypatch.setattr(image_source, "open_regular", fails)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).parent != closed and allowed(path, mode))
    seen = counted(monkeypatch)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"1 of 3 images .*red/a\.png: .*Permission denied"):
            assert len(module.embed_images(Model(), folder, tmp_path / "e")) == 2
    assert sum(seen) == 2, "the second call had nothing to do"
    monkeypatch.undo()
    assert len(module.embed_images(Model(), folder, tmp_path / "e")) == 3


def _refuse(path):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


@pytest.mark.parametrize("command", [False, True])
def test_a_shard_whose_reading_broke_off_is_read_again(tmp_path, monkeypatch, command):
    shard = tmp_path / "0.tar"
    make_tar(shard, {f"{i}.png": encoded(Image.effect_noise((32, 32), 50)) for i in range(9)})
    (tmp_path / "down").touch()
    if command:  # whose shard has no stamp
        script = f"if [ -e {tmp_path}/down ]; then head -c 8000 {shard}; exit 7; fi; cat {shard}"
        (tmp_path / "get.sh").write_text(script)
        source = f"pipe:sh {tmp_path}/get.sh 0.tar"
        monkeypatch.setattr("fromage.data.shards.ATTEMPTS", 1)
    else:
        source = shard
        monkeypatch.setattr("fromage.data.shards.open_shard", lambda shard: Breaks(shard, tmp_path / "down"))
    with pytest.warns(UserWarning, match=r"0\.tar: unreadable.*after \d samples"):
        assert 0 < len(module.embed_images(Model(), source, tmp_path / "e")) < 9
    (tmp_path / "down").unlink()
    assert len(module.embed_images(Model(), source, tmp_path / "e")) == 9
    seen = counted(monkeypatch)
    assert len(module.embed_images(Model(), source, tmp_path / "e")) == 9 and not seen


class Breaks(io.BytesIO):
    """A shard on a disk that fails while there is the file `down`."""

    def __init__(self, shard, down):
        self.down = down.exists()
        super().__init__(Path(shard).read_bytes()[: 8000 if self.down else None])

    def read(self, size=-1):
        if not (data := super().read(size)) and self.down:
            raise OSError(errno.EIO, "Input/output error")
        return data


def test_a_shard_that_was_still_being_copied_is_read_again(tmp_path, monkeypatch):
    shard = make_tar(tmp_path / "0.tar", {f"{i}.png": encoded(Image.effect_noise((32, 32), 50)) for i in range(9)})
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2 + 100])
    embed = module.embed_chunk

    def ends(*args):
        shard.write_bytes(whole)  # when it has been read
        return embed(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "embed_chunk", ends)
        with pytest.warns(UserWarning, match=r"0\.tar"):
            assert len(module.embed_images(Model(), shard, tmp_path / "e")) < 9
    assert len(module.embed_images(Model(), shard, tmp_path / "e")) == 9


@pytest.mark.parametrize("at", ["unlink", "write_files"])
def test_a_kill_while_a_source_is_taken_up_leaves_no_part_of_what_has_gone(tmp_path, monkeypatch, at):
    folder, out = tmp_path / "images", tmp_path / "e"
    folder.mkdir()
    monkeypatch.setattr(image_source, "FILES_PER_PART", 2)

    def make(*numbers):
        for n in numbers:
            Image.new("RGB", (4, 4), (20 * n, 9, 9)).save(folder / f"{n:02}.png")

    def killed(path, *args, **kwargs):
        if at == "write_files" or path.suffix == ".parquet":
            raise Killed
        unlink(path, *args, **kwargs)

    make(*range(6))
    module.embed_images(Model(), folder, out)
    for n in range(2, 6):
        (folder / f"{n:02}.png").unlink()
    unlink = Path.unlink
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*((Path, "unlink") if at == "unlink" else ("fromage.retrieval.embedding_store.write_files",)), killed)
        module.embed_images(Model(), folder, out)
    for new in ((), (10, 11, 12, 13)):
        make(*new)
        _, items = rows_and_items(module.embed_images(Model(), folder, out))
        assert sorted(item.path for item in items) == sorted(map(str, folder.iterdir()))


def test_what_else_lies_beside_embeddings_stays_when_nothing_was_usable(tmp_path):
    folder, out = tmp_path / "images", tmp_path / "results"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.bmp")
    with pytest.raises(UserError, match="every embedding is zero"):
        module.embed_images(Model(), folder, out)
    assert not out.exists()
    Image.new("RGB", (4, 4), "red").save(folder / "a.bmp")
    module.embed_images(Model(), folder, out)
    (out / "notes.txt").write_text("mine")
    (out / "thesis").mkdir()
    (out / "2024.parquet").write_text("mine too")
    (folder / "a.bmp").write_bytes(b"broken now")
    with pytest.raises(UserError, match="no usable image"):
        module.embed_images(Model(), folder, out)
    assert sorted(path.name for path in out.iterdir()) == ["2024.parquet", "notes.txt", "thesis"]


@pytest.mark.parametrize("odd", [0.0, 3e38])
def test_an_image_whose_embedding_has_no_direction_is_left_out_and_named(tmp_path, odd):
    rows = [np.full(3, odd if i == 2 else i + 1.0, np.float32) for i in range(4)]
    shard = make_tar(tmp_path / "0.tar", {f"{i}.npy": encoded_npy(row) for i, row in enumerate(rows)})
    with pytest.warns(UserWarning, match=r"1 of 4 images.*0\.tar#2: its embedding is zero, infinite or NaN"):
        embeddings, found = embed_images(Model(), shard)
    assert [item.path[-2:] for item in found] == ["#0", "#1", "#3"] and np.isfinite(embeddings).all()


def test_a_model_that_gives_no_embedding_any_direction_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "embed_images", lambda self, features: torch.full((len(features), 3), torch.nan))
    with pytest.raises(UserError, match="every embedding is zero, infinite or NaN; embed it with a sound checkpoint"):
        embed_images(Model(), write_colours(tmp_path / "images"))


@pytest.mark.filterwarnings("ignore:.*04.bmp")
def test_rows_of_another_width_shift_nobody(images, tmp_path):
    """Foreign embeddings: a row that is missing would give its place to the next."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    store = module.embed_images(Model(), images, tmp_path / "out", dtype="float32")
    part = tmp_path / "out" / "00000.parquet"
    table = pq.read_table(part)
    for column in (pa.array([None, [1.0] * 3], pa.list_(pa.float32(), 3)), pa.array([[1.0] * 2, [1.0] * 4])):
        odd = table.set_column(table.schema.get_field_index("embedding"), "embedding", column)
        pq.write_table(odd.replace_schema_metadata(table.schema.metadata), part)
        with pytest.raises(UserError, match="not all 3 wide"):
            list(store.batches())
