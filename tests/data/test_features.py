import errno
import io
import json
import os
import types
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fromage.data.batches import SamplePreprocessor, collate
from fromage.data.broken import Broken, decoded
from fromage.data.datamodule import CC3M
from fromage.data.features import check_features, check_source, store_features
from fromage.data.sample_images import ImageReader, to_npy
from fromage.data.shard_names import expand
from fromage.data.shard_sizes import read_sizes
from fromage.data.shard_writer import write_shards
from fromage.data.shards import captions_of, read_shard
from fromage.data.tokenizer import PromptTokenizer
from fromage.data.workers import usual_workers
from fromage.errors import UserError
from fromage.models.frozen import TOY


def transform(image):
    return torch.from_numpy(np.asarray(image.resize((2, 2)), dtype=np.float32).copy()).permute(2, 0, 1) / 255


class Vision(nn.Module):
    """Pooled features of an image: its mean colours, scaled. Counts the images it was shown."""

    def __init__(self, dtype=torch.float32, name="tiny", stops_after=None):
        super().__init__()
        self.scale, self.transform = nn.Parameter(torch.tensor([1.0, -1 / 3, 1e-4], dtype=dtype)), transform
        self.dtype, self.name, self.shown, self.stops_after = dtype, name, 0, stops_after

    def forward(self, pixels):
        self.shown += len(pixels)
        if self.stops_after is not None and self.shown > self.stops_after:
            raise KeyboardInterrupt
        return pixels.to(self.dtype).mean((2, 3)) * self.scale

    def fingerprint(self, decoding="draft"):
        return {"tower": self.name, "weights": "0", "preprocessing": f"resize 2, {decoding}"}


class Tokenizer:
    pad_id, ret_ids = 1, [3]

    def start(self):
        return []

    def caption(self, text, max_tokens):
        return [2, 3]


def shards(folder, n=10, bad=()):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).save(buffer, "PNG")
        rows.append((f"k{i}", b"junk" if i in bad else buffer.getvalue(), f"number {i}", {"n": i}))
    write_shards(rows, folder, per_shard=4)
    return str(folder)


def red(i):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 6), (i, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def batch(folder, vision):
    data = CC3M("unused", str(folder), val_batch_size=100, workers=0)
    data.attach(vision.transform, Tokenizer())
    return next(iter(data.val_dataloader()))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_features_are_those_of_the_images(tmp_path, dtype, workers):
    vision, source = Vision(dtype), shards(tmp_path / "s")
    assert store_features(source, tmp_path / "f", vision, batch_size=3, workers=workers) == 10
    assert read_sizes(tmp_path / "f") == read_sizes(tmp_path / "s")
    images, stored = batch(source, vision), batch(tmp_path / "f", vision)
    assert stored.features.dtype == dtype
    assert stored.features.equal(vision(images.pixels))
    assert (stored.keys, stored.captions) == (images.keys, images.captions)
    first = next(read_shard(expand(str(tmp_path / "f"))[0], print))
    assert first.keys() - {"__key__", "__url__"} == {"npy", "txt", "json"}
    assert json.loads(first["json"]) == {"n": 0}


def test_a_tower_of_damaged_weights_stores_nothing(tmp_path):
    vision = Vision()
    vision.scale.data.fill_(torch.nan)
    with pytest.raises(UserError, match="vision tower tiny: its features are not finite; its weights are damaged"):
        store_features(shards(tmp_path / "s"), tmp_path / "f", vision)
    assert not list((tmp_path / "f").glob("*.tar"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_an_image_of_several_samples_is_decoded_and_encoded_once(tmp_path, batch_size, workers):
    kinds = [0, 0, 1, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3]  # two shards: 0, 1, 2, 3 and 3
    write_shards([(f"k{i}", red(40 * n), f"{i}", {}) for i, n in enumerate(kinds)], tmp_path / "s", per_shard=12)
    vision = Vision()
    assert store_features(str(tmp_path / "s"), tmp_path / "f", vision, batch_size, workers=workers) == len(kinds)
    assert vision.shown == 5
    images, stored = batch(tmp_path / "s", vision), batch(tmp_path / "f", vision)
    assert stored.keys == images.keys and stored.features.equal(vision(images.pixels))


def test_usual_workers_leave_the_cores_to_the_tower(monkeypatch):
    for cores, expected in ((1, 1), (2, 1), (6, 3), (64, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert usual_workers() == expected


def test_an_image_of_several_captions_is_encoded_and_stored_once(tmp_path):
    said = [[f"{i}.{j}" for j in range(1 + i % 3)] for i in range(6)]
    rows = [(f"k{i}", red(i), texts[0], {"captions": texts}) for i, texts in enumerate(said)]
    write_shards(rows, tmp_path / "s", per_shard=4)
    vision = Vision()
    assert store_features(str(tmp_path / "s"), tmp_path / "f", vision, workers=0) == vision.shown == 6
    stored = [raw for shard in expand(str(tmp_path / "f")) for raw in read_shard(shard, print)]
    assert [captions_of(raw) for raw in stored] == said
    of_features, of_images = batch(tmp_path / "f", vision), batch(tmp_path / "s", vision)
    assert of_features.more._replace(ids=0) == of_images.more._replace(ids=0)
    assert of_features.more.ids.equal(of_images.more.ids)


def test_images_may_be_kept(tmp_path):
    source = shards(tmp_path / "s")
    store_features(source, tmp_path / "f", Vision(), keep_images=True, workers=0)
    before, after = (list(read_shard(expand(f)[0], print)) for f in (source, str(tmp_path / "f")))
    assert [a["jpg"] for a in after] == [b["jpg"] for b in before]
    with pytest.raises(UserError, match="holds features with their images; name another folder"):
        store_features(source, tmp_path / "f", Vision(), workers=0)


def test_an_interrupted_run_is_taken_up(tmp_path):
    source, out = shards(tmp_path / "s"), tmp_path / "f"
    with pytest.raises(KeyboardInterrupt):
        store_features(source, out, Vision(stops_after=6), batch_size=2, workers=0)
    assert sorted(p.name for p in out.iterdir()) == ["00000.tar", "features.json", "sizes.json"]
    vision = Vision()
    assert store_features(source, out, vision, workers=0) == vision.shown == 6
    assert store_features(source, out, vision, workers=0) == 0
    store_features(source, tmp_path / "g", vision, workers=0)
    for name in ("00000.tar", "00001.tar", "00002.tar", "sizes.json"):
        assert (out / name).read_bytes() == (tmp_path / "g" / name).read_bytes()


def test_another_tower_is_refused(tmp_path):
    source, out = shards(tmp_path / "s"), tmp_path / "f"
    store_features(source, out, Vision(), workers=0)
    check_features(str(out), Vision())
    check_features(source, Vision(name="other"))
    for act in (lambda v: check_features(str(out), v), lambda v: store_features(source, out, v, workers=0)):
        with pytest.raises(UserError, match="tower 'tiny' there, 'other' here"):
            act(Vision(name="other"))


def test_the_data_module_compares_the_towers(tmp_path):
    store_features(shards(tmp_path / "s"), tmp_path / "f", Vision(), workers=0)
    data = CC3M(str(tmp_path / "f"), batch_size=2, workers=0)
    model = types.SimpleNamespace(vision=Vision(name="other"), tokenizer=Tokenizer())
    module = types.SimpleNamespace(model=model)
    data.trainer = types.SimpleNamespace(
        lightning_module=module, global_rank=0, world_size=1, current_epoch=0, fit_loop=None
    )
    with pytest.raises(UserError, match="another tower"):
        data.train_dataloader()
    model.vision = Vision()
    assert len(list(data.train_dataloader())) == 5
    data.decoding = "exact"
    with pytest.raises(UserError, match="draft' there"):
        data.train_dataloader()


def test_images_are_decoded_as_asked(tmp_path, toy_model, shared_data):
    photograph = min((shared_data / "coco_sample" / "val2017").iterdir()).read_bytes()
    write_shards([("a", photograph, "two words", {})], tmp_path / "s")
    pixels = {}
    for decoding in ("draft", "exact"):
        store_features(str(tmp_path / "s"), tmp_path / decoding, toy_model.vision, workers=0, decoding=decoding)
        data = CC3M("unused", str(tmp_path / "s"), val_batch_size=1, workers=0, decoding=decoding)
        data.attach(toy_model.vision.transform, Tokenizer())
        (rows,) = data.val_dataloader()
        stored = batch(tmp_path / decoding, toy_model.vision).features
        torch.testing.assert_close(stored, toy_model.vision(rows.pixels), rtol=0, atol=1e-5)
        pixels[decoding] = rows.pixels
    assert not torch.equal(*pixels.values())


def test_broken_samples_are_left_out_until_they_are_too_many(tmp_path):
    source = shards(tmp_path / "s", bad=[1, 5])
    with pytest.raises(UserError, match=r"2 of 10 samples are broken .*k5"):
        store_features(source, tmp_path / "f", Vision(), workers=0)
    assert store_features(source, tmp_path / "g", Vision(), workers=0, max_broken=0.2) == 8
    assert batch(tmp_path / "g", Vision()).keys == [f"k{i}" for i in range(10) if i not in (1, 5)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_verdict_is_the_same_however_the_work_is_cut(tmp_path, workers):
    """Two of ten, all in the last shard: more than its share, and of a worker's."""
    source, out = shards(tmp_path / "s", bad=[8, 9]), tmp_path / "f"
    assert store_features(source, out, Vision(), workers=workers, max_broken=0.2) == 8
    (out / "00002.tar").unlink()
    assert store_features(source, out, Vision(), workers=workers, max_broken=0.2) == 0
    for _ in range(2):  # running it again does not pass it over
        with pytest.raises(UserError, match="2 of 10 samples are broken"):
            store_features(source, tmp_path / "g", Vision(), workers=workers, max_broken=0.19)


def test_a_shard_that_was_mended_is_judged_anew(tmp_path):
    source, out = shards(tmp_path / "s", bad=[8, 9]), tmp_path / "f"
    with pytest.raises(UserError, match="2 of 10 samples are broken"):
        store_features(source, out, Vision(), workers=0)
    mended = shards(tmp_path / "m")
    for name in ("00002.tar", "sizes.json"):
        (tmp_path / "s" / name).write_bytes((Path(mended) / name).read_bytes())
    (out / "00002.tar").unlink()
    assert store_features(source, out, Vision(), workers=0) == 2


def test_images_are_kept_or_not_from_the_first_shard_on(tmp_path):
    """Nothing was stored by the run that was killed, so the next one decides."""
    source, out = shards(tmp_path / "s"), tmp_path / "f"
    with pytest.raises(KeyboardInterrupt):
        store_features(source, out, Vision(stops_after=0), batch_size=2, workers=0, keep_images=True)
    store_features(source, out, Vision(), workers=0)
    assert store_features(source, out, Vision(), workers=0) == 0


def test_folders_that_hold_something_else_are_refused(tmp_path):
    source = shards(tmp_path / "s")
    with pytest.raises(UserError, match=r"something else than features"):
        store_features(source, tmp_path / "s", Vision(), workers=0)
    with pytest.raises(UserError, match=r"several shards are called 00000\.tar"):
        store_features([source, shards(tmp_path / "t")], tmp_path / "f", Vision(), workers=0)


def test_features_of_another_width_are_skipped_and_named():
    def stored(width):
        return {"__key__": f"k{width}", "npy": to_npy(torch.ones(width)), "txt": b"a star"}

    tokenizer = PromptTokenizer(str(TOY / "opt"))
    for width in (None, 12):
        broken = Broken(0.5)
        decode = SamplePreprocessor(ImageReader(lambda image: image, width), tokenizer, 40)
        rows = list(decoded([stored(12), stored(5), stored(12)], decode, broken))
        assert collate(rows, 0).features.shape == (2, 12)
        assert broken.bad == 1 and broken.last[0] == "k5 (features of another width: 5, not 12)"


def test_a_run_on_features_of_another_width_is_one_line(tmp_path):
    store_features(shards(tmp_path / "s"), tmp_path / "f", Vision(), workers=0)
    data, model = CC3M(str(tmp_path / "f"), str(tmp_path / "f"), batch_size=2, workers=0), types.SimpleNamespace()
    model.vision, model.tokenizer = Vision(), PromptTokenizer(str(TOY / "opt"))
    model.vision.width = 5  # and says that it is the same tower
    data.trainer = types.SimpleNamespace(
        lightning_module=types.SimpleNamespace(model=model), global_rank=0, world_size=1, current_epoch=0, fit_loop=None
    )
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with pytest.raises(UserError, match=r"broken .*features of another width: 3, not 5") as told:
            list(loader)
        assert "\n" not in str(told.value)


def test_features_of_other_shards_of_the_same_name_are_refused(tmp_path):
    source, out = shards(tmp_path / "s"), tmp_path / "f"
    store_features(source, out, Vision(), workers=0)
    with pytest.raises(UserError, match=r"of other shards \(00000\.tar there is of .*/s, here of .*/t\); name another"):
        store_features(shards(tmp_path / "t"), out, Vision(), workers=0)
    with pytest.raises(UserError, match="of other shards"):
        check_source(str(tmp_path / "t"), out)
    check_source(source, out)
    about = out / "features.json"
    about.write_text(json.dumps({k: v for k, v in json.loads(about.read_text()).items() if k != "source"}))
    assert store_features(source, out, Vision(), workers=0) == 0  # as it was written before


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, disk):
    source, out = shards(tmp_path / "s"), tmp_path / "f"
    disk(2000)
    with pytest.raises(
        UserError, match=r"00000\.tar: cannot be written \(File too large\); shards that are finished are kept"
    ):
        store_features(source, out, Vision(), workers=0)
    assert sorted(p.name for p in out.iterdir()) == ["features.json"]
    disk()
    assert store_features(source, out, Vision(), workers=0) == 10


def test_a_worker_that_cannot_hand_its_images_over_is_one_line(tmp_path, disk):
    """The parts of memory that processes share are files: with a full /dev/shm the reader would wait for good."""
    source, vision = shards(tmp_path / "s"), Vision()
    vision.transform = lambda image: transform(image).repeat(1, 50, 50)
    disk(20_000)
    with pytest.raises(UserError, match=r"worker .* exited unexpectedly: .*shared memory \(/dev/shm\) is full"):
        store_features(source, tmp_path / "f", vision, workers=1)


def test_a_folder_that_another_process_writes_is_refused(tmp_path, other_writer):
    pid = other_writer(tmp_path / "f")
    with pytest.raises(UserError, match=f"f: is in use by process {pid}"):
        store_features(shards(tmp_path / "s"), tmp_path / "f", Vision(), workers=0)


def test_shards_that_are_newer_than_their_features_are_refused(tmp_path):
    source, out = shards(tmp_path / "s"), tmp_path / "f"
    store_features(source, out, Vision(), workers=0)
    made = (out / "00001.tar").stat()
    os.utime(tmp_path / "s" / "00001.tar", (made.st_atime, made.st_mtime + 5))
    with pytest.raises(UserError, match=r"s/00001\.tar: is newer than its features; remove .*f/00001\.tar"):
        store_features(source, out, Vision(), workers=0)
    (out / "00001.tar").unlink()
    assert store_features(source, out, vision := Vision(), workers=0) == vision.shown > 0


class Breaks:
    """A shard on a disk that fails after some bytes; None: that does not."""

    def __init__(self, path, size):
        self.file, self.whole = io.BytesIO(Path(path).read_bytes()[:size]), size is None

    def read(self, size):
        if (data := self.file.read(size)) or self.whole:
            return data
        raise OSError(errno.EIO, "Input/output error")

    def close(self):
        pass


@pytest.mark.parametrize("stops", [False, True])
def test_a_shard_whose_reading_broke_off_is_stored_and_done_again(tmp_path, monkeypatch, stops):
    source, out = shards(tmp_path / "s"), tmp_path / "f"
    (tmp_path / "s" / "sizes.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("fromage.data.shards.open_shard", lambda shard: Breaks(shard, 9000 if "00001" in shard else None))
        assert store_features(source, out, Vision(), workers=0, max_broken=0.2) == 4 + 2 + 2
    if stops:  # the next run, when it has read the shard and not stored it yet
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("fromage.data.features.StoredShard.close", stopped)
            store_features(source, out, Vision(), workers=0)
    assert store_features(source, out, vision := Vision(), workers=0) == vision.shown == 4
    assert len(batch(out, Vision()).keys) == 10
    assert store_features(source, out, Vision(), workers=0) == 0


def stopped(*args):
    raise KeyboardInterrupt


def test_a_shard_that_is_damaged_is_done(tmp_path):
    source, out = shards(tmp_path / "s"), tmp_path / "f"
    (tmp_path / "s" / "sizes.json").unlink()
    os.truncate(tmp_path / "s" / "00001.tar", 9000)
    first = store_features(source, out, Vision(), workers=0, max_broken=0.2)
    assert first == 4 + 2 + 2 and store_features(source, out, Vision(), workers=0, max_broken=0.2) == 0


@pytest.fixture
def remote(tmp_path):
    """Features of a tower called tiny: their folder here, and at a URL."""
    store_features(shards(tmp_path / "s"), tmp_path / "f", Vision(), workers=0)
    disk = fsspec.filesystem("memory")
    disk.put(f"{tmp_path}/f", "/features", recursive=True)
    yield tmp_path / "f", "memory://features"
    disk.rm("/features", recursive=True)


def test_features_of_another_tower_at_a_url_are_refused(remote):
    _, url = remote
    check_features(f"{url}/0000{{0..2}}.tar", Vision())
    with pytest.raises(UserError, match="tower 'tiny' there, 'other' here"):
        check_features(f"{url}/0000{{0..2}}.tar", Vision(name="other"))


@pytest.mark.parametrize("damage", [None, b"<html>", b"[]"])
def test_features_of_a_tower_that_is_not_known_are_told_once(remote, damage):
    folder, url = remote
    disk = fsspec.filesystem("memory")
    disk.rm("/features/features.json")
    if damage:
        disk.pipe("/features/features.json", damage)
    (folder / "features.json").unlink()
    for source in (f"{url}/0000{{0..2}}.tar", str(folder), f"pipe:cat {folder}/00000.tar"):
        with pytest.warns(UserWarning, match=r"0000.\.tar: no features\.json beside these stored features says") as told:
            check_features(source, Vision())
        assert len(told) == 1


def test_nothing_is_told_of_images_and_of_shards_that_cannot_be_read(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_features(shards(tmp_path / "s"), Vision())
        check_features("memory://gone/00000.tar", Vision())
