import io
import json
import logging
import multiprocessing
import os
import re
import struct
import tarfile
import zlib

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn

from fromage.data.datamodule import CC3M
from fromage.data.requests import REQUESTS, request
from fromage.data.sample_images import to_npy
from fromage.data.shard_writer import write_shards
from fromage.data.shards import captions_of
from fromage.errors import BrokenSample, UserError


class Tokenizer:
    """A token per letter; bos 2, pad 1, [RET] 999."""

    pad_id, ret_id, ret_ids = 1, 999, [999]

    def start(self):
        return [2]

    def caption(self, text, max_tokens):
        return [*[2, *map(ord, text)][: max_tokens - 1], self.ret_id]


def transform(image):
    assert image.mode == "RGB"
    return torch.from_numpy(np.asarray(image.resize((2, 2)), dtype=np.float32).copy()).permute(2, 0, 1)


def image(colour=(10, 20, 30), mode="RGB", kind="PNG", size=(4, 4)):
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


def huge():
    """A PNG of some bytes that says it has a hundred million pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">II4s", zlib.crc32(head), 9, b"IDAT")


def shards(folder, n=24, per_shard=4, bad=(), jpeg=b"broken"):
    """Sample i has the caption 'number i' and an image whose red is i; those in bad cannot be decoded."""
    rows = [(f"k{i:03d}", jpeg if i in bad else image((i, 0, 0)), f"number {i}", {}) for i in range(n)]
    write_shards(rows, folder, per_shard)
    return str(folder)


def captioned(folder, n=24, each=5, per_shard=4):
    """As `shards`, but image i has the captions 'i.0', 'i.1' ..."""
    rows = []
    for i in range(n):
        said = [f"{i}.{j}" for j in range(each)]
        rows.append((f"k{i:03d}", image((i, 0, 0)), said[0], {"captions": said}))
    write_shards(rows, folder, per_shard)
    return str(folder)


def tar(path, *samples):
    """A tar of (key, members)."""
    with tarfile.open(path, "w") as out:
        for key, members in samples:
            for kind, data in members.items():
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))
    return str(path)


def module(train, val=None, **named):
    data = CC3M(train, val, **{"batch_size": 4, "workers": 0, **named})
    data.attach(transform, Tokenizer())
    return data


def keys(loader):
    return [key for batch in loader for key in batch.keys]


def test_a_batch(tmp_path):
    batch = next(iter(module("unused", shards(tmp_path / "s", 11, 11), batch_size=11).val_dataloader()))
    assert batch.captions == [f"number {i}" for i in range(11)]
    assert batch.ids.dtype == torch.int64
    assert batch.ids.shape == (11, 11)
    assert batch.lengths == [10] * 10 + [11]
    assert batch.ids[0].tolist() == [2, *map(ord, "number 0"), 999, 1]
    assert batch.pixels.dtype == torch.float32
    assert batch.pixels[:, 0, 0, 0].tolist() == list(range(11))
    assert batch.features is None


def test_long_captions_keep_ret(tmp_path):
    batch = next(iter(module("unused", shards(tmp_path / "s", 4), max_tokens=5).val_dataloader()))
    assert batch.ids.tolist() == [[2, *map(ord, "num"), 999]] * 4


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_validation_gives_every_sample_once_in_order(tmp_path, workers):
    loader = module("unused", shards(tmp_path / "s", 23, 5), val_batch_size=4, workers=workers).val_dataloader()
    expected = [f"k{i:03d}" for i in range(23)]
    assert keys(loader) == expected
    assert keys(loader) == expected
    assert len(loader) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_training_epochs_differ_and_reruns_repeat(tmp_path, workers):
    data = module(shards(tmp_path / "s"), workers=workers, seed=3)
    loader = data.train_dataloader()
    assert len(loader) == 6
    first, second = keys(loader), keys(loader)
    assert sorted(first) == sorted(second) == [f"k{i:03d}" for i in range(24)]
    assert first != second
    again = data.train_dataloader()
    assert [keys(again), keys(again)] == [first, second]
    data.seed = 4
    assert keys(data.train_dataloader()) not in (first, second)


def test_no_shuffle_keeps_the_stored_order(tmp_path):
    assert keys(module(shards(tmp_path / "s"), shuffle=0).train_dataloader()) == [f"k{i:03d}" for i in range(24)]


def test_an_epoch_drops_the_incomplete_batch(tmp_path):
    loader = module(shards(tmp_path / "s"), batch_size=5).train_dataloader()
    assert [len(batch.keys) for batch in loader] == [5] * 4
    (tmp_path / "s/sizes.json").unlink()
    loader = module(str(tmp_path / "s"), batch_size=5).train_dataloader()
    assert [len(batch.keys) for batch in loader] == [5] * 4
    with pytest.raises(TypeError):
        len(loader)


def rank_of_two(rank, data, tell):
    """The keys that one of two processes trains and validates on, and how many batches it was promised."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    loader = data.train_dataloader()
    tell.send((keys(loader), [batch.keys for batch in data.val_dataloader()], len(loader)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sizes", [True, False])  # of the training shards
def test_two_processes_share_without_overlap(tmp_path, workers, sizes):
    data = module(shards(tmp_path / "s", 32), shards(tmp_path / "v", 21), workers=workers)
    if not sizes:
        (tmp_path / "s/sizes.json").unlink()
        data.samples_per_epoch = 32
    fork, pipes = multiprocessing.get_context("fork"), [multiprocessing.Pipe(duplex=False) for _ in range(2)]
    ranks = [fork.Process(target=rank_of_two, args=(rank, data, tell)) for rank, (_, tell) in enumerate(pipes)]
    for process in ranks:
        process.start()
    assert all(told.poll(100) for told, _ in pipes)
    train, val, promised = zip(*(told.recv() for told, _ in pipes), strict=True)
    for process in ranks:
        process.join()
    assert promised == (4, 4) and [len(t) for t in train] == [16, 16]
    assert sorted(train[0] + train[1]) == [f"k{i:03d}" for i in range(32)]
    assert not set(train[0]) & set(train[1])
    assert [len(v) for v in val] == [3, 3]
    dealt = [key for pair in zip(*val, strict=True) for batch in pair for key in batch]
    assert dealt == [f"k{i:03d}" for i in range(21)]


def test_workers_never_outnumber_shards(tmp_path):
    loader = module(shards(tmp_path / "s", 24, 12), workers=5).train_dataloader()
    assert loader.num_workers == 2
    assert sorted(keys(loader)) == [f"k{i:03d}" for i in range(24)]


def test_unequal_workers_make_batches_by_their_samples(tmp_path):
    loader = module(shards(tmp_path / "s", 24, 8), workers=2).train_dataloader()  # parts of 16 and 8
    assert sorted(keys(loader)) == [f"k{i:03d}" for i in range(24)]


def test_samples_per_epoch_bounds_and_repeats(tmp_path):
    folder = shards(tmp_path / "s")
    assert len(keys(module(folder, samples_per_epoch=9).train_dataloader())) == 8
    twice = keys(module(folder, samples_per_epoch=48).train_dataloader())
    assert sorted(twice[:24]) == sorted(twice[24:]) == [f"k{i:03d}" for i in range(24)]
    assert twice[:24] != twice[24:]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"batch_size": 25}, "too few for batch_size 25"),
        ({"batch_size": 5, "workers": 6, "sizes": False}, "less than a batch"),
        ({"world": "8", "samples_per_epoch": 99}, "cannot feed 8 devices"),
        ({"world": "2", "sizes": False}, "samples_per_epoch"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(tmp_path, monkeypatch, named, message):
    folder = shards(tmp_path / "s")
    if not named.pop("sizes", True):
        (tmp_path / "s/sizes.json").unlink()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", named.pop("world", "1"))
    with pytest.raises(UserError, match=message):
        keys(module(folder, **named).train_dataloader())


def test_a_device_without_validation_batch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(UserError, match="6 validation batches are too few for 7 devices"):
        module("unused", shards(tmp_path / "s")).val_dataloader()
    (tmp_path / "s/sizes.json").unlink()
    with pytest.raises(UserError, match="known number of validation samples"):
        module("unused", str(tmp_path / "s")).val_dataloader()


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ({"jpg": b"junk", "txt": b"x"}, "undecodable image"),
        ({"jpg": image()[:50], "txt": b"x"}, "undecodable image"),
        ({"txt": b"x"}, "no image"),
        ({"jpg": image()}, "no caption"),
        ({"jpg": image(), "txt": b" \n"}, "empty caption"),
        ({"jpg": image(), "txt": b"\xff\xfe"}, "caption is not UTF-8"),
        ({"jpg": image(), "txt": b"x" * 70_000}, "caption too long: 70000 bytes"),
        ({"png": image(kind="PNG", size=(1, 3000)), "txt": b"x"}, "undecodable image: 1 x 3000 pixels are too"),
        ({"png": huge(), "txt": b"x"}, "undecodable image: 10000 x 10000 pixels are too"),
        ({"npy": b"junk", "txt": b"x"}, "unreadable features"),
    ],
)
def test_a_broken_sample_is_skipped_and_logged(tmp_path, caplog, members, cause):
    good = {"jpg": image(), "txt": b"fine"}
    path = tar(tmp_path / "x.tar", ("a", good), ("b", members), ("c", good))
    with caplog.at_level(logging.WARNING):
        assert keys(module("unused", path, max_broken=0.5).val_dataloader()) == ["a", "c"]
    assert f"skipped b: {cause}" in caplog.text
    with pytest.raises(UserError, match=rf"1 of 3 samples.*33\.3%.*b \({cause}.*raise max_broken"):
        keys(module("unused", path).val_dataloader())


@pytest.mark.parametrize(
    ("kind", "mode", "size"),
    [("JPEG", "CMYK", (4, 4)), ("PNG", "P", (4, 4)), ("PNG", "I;16", (4, 4)), ("PNG", "RGB", (1, 1)), ("JPEG", "L", (1, 1)),
     ("PNG", "LA", (4, 4)), ("PNG", "1", (90, 1)), ("WEBP", "RGBA", (3, 3))],
)  # fmt: skip
def test_uncommon_images_and_captions_are_used(tmp_path, kind, mode, size):
    caption = "👩‍👩‍👧 日本語 \u202e\x00 <|image|>[RET]</s>"
    member = {kind.lower(): image(None, mode, kind, size), "txt": f" {caption}\n".encode()}
    batch = next(iter(module("unused", tar(tmp_path / "x.tar", ("odd", member)), max_tokens=99).val_dataloader()))
    assert (batch.keys, batch.captions) == (["odd"], [caption])
    assert batch.pixels.isfinite().all()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("hook", ["train_dataloader", "val_dataloader"])
def test_too_many_broken_samples_stop_the_run(tmp_path, workers, hook):
    folder = shards(tmp_path / "s", bad=range(0, 24, 3))
    data = module(folder, folder, workers=workers)
    with pytest.raises(UserError, match=r"^\d+ of \d+ samples are broken .*max_broken$"):
        keys(getattr(data, hook)())
    data.max_broken = 0.5
    assert set(keys(getattr(data, hook)())) <= {f"k{i:03d}" for i in range(24) if i % 3}


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_torn_validation_shard_is_the_same_share_for_any_number_of_workers(tmp_path, workers):
    folder = shards(tmp_path / "s", 240, 24)
    sizes = json.loads((tmp_path / "s" / "sizes.json").read_text())
    sizes["00000.tar"] += 7  # of 247 samples: 2.8 %, and 10 % of what one of four workers uses
    (tmp_path / "s" / "sizes.json").write_text(json.dumps(sizes))
    loader = module("unused", folder, max_broken=0.05, workers=workers).val_dataloader()
    assert len(keys(loader)) == 240
    with pytest.raises(UserError, match="are broken"):
        keys(module("unused", folder, max_broken=0.02, workers=workers).val_dataloader())


def test_options_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match="val_batch_size"):
        CC3M("unused", val_batch_size=0)
    with pytest.raises(UserError, match="val_shards"):
        CC3M("unused").predict_dataloader()


def test_a_long_stream_stops_at_the_hundredth_sample(tmp_path):
    loader = module("unused", shards(tmp_path / "s", 300, 100, bad=range(0, 90, 9))).val_dataloader()
    seen = []
    with pytest.raises(UserError, match=r"10 of 100 samples"):
        seen += [batch.keys for batch in loader]
    assert seen == []


def test_nothing_usable_never_hangs(tmp_path):
    folder = shards(tmp_path / "s", bad=range(24))
    with pytest.raises(UserError, match="no sample to train on"):
        keys(module(folder, max_broken=1).train_dataloader())
    assert keys(module("unused", folder, max_broken=1).val_dataloader()) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_shard_is_skipped_with_its_name(tmp_path, caplog, workers):
    folder = shards(tmp_path / "s")
    cut = tmp_path / "s/00001.tar"
    cut.write_bytes(cut.read_bytes()[:4000])
    data = module(folder, folder, workers=workers, max_broken=0.5)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert {f"k{i:03d}" for i in (*range(4), *range(8, 24))} <= set(keys(loader))
    assert workers or "skipped 00001.tar: truncated or damaged" in caplog.text
    data.max_broken = 0.05
    with pytest.raises(UserError, match=r"00001\.tar"):
        keys(data.val_dataloader())


@pytest.mark.parametrize(("command", "workers"), [("sleep 600", 2), ("exit 3", 0), ("echo no tar", 0)])
def test_an_address_that_stalls_or_fails_is_named_and_never_waited_for(tmp_path, monkeypatch, command, workers):
    monkeypatch.setattr("fromage.data.shard_streams.PATIENCE", 0.3)
    monkeypatch.setattr("fromage.data.shards.ATTEMPTS", 1)
    both = [shards(tmp_path / "s"), f"pipe:{command} # gone.tar"]
    data = module(both, both, workers=workers, max_broken=0.5, samples_per_epoch=24)
    assert keys(data.val_dataloader()) == [f"k{i:03d}" for i in range(24)]
    assert set(keys(data.train_dataloader())) <= {f"k{i:03d}" for i in range(24)}
    data.max_broken = 0
    with pytest.raises(UserError, match=r"1 of \d+ samples are broken .*gone\.tar \(unreadable"):
        keys(data.val_dataloader())


def test_features_take_the_images_place(tmp_path):
    vector = torch.randn(3).bfloat16()
    path = tar(tmp_path / "x.tar", ("a", {"jpg": b"never decoded", "npy": to_npy(vector), "txt": b"x"}))
    batch = next(iter(module("unused", path).val_dataloader()))
    assert batch.pixels is None
    assert batch.features.dtype == torch.bfloat16
    assert batch.features.equal(vector[None])


def test_features_and_images_do_not_mix(tmp_path):
    stored = {"npy": to_npy(torch.ones(3)), "txt": b"x"}
    path = tar(tmp_path / "x.tar", ("a", stored), ("b", {"jpg": image(), "txt": b"x"}))
    with pytest.raises(UserError, match="shards of one kind"):
        keys(module("unused", path).val_dataloader())


def test_a_pickle_is_never_loaded(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"any": "object"}], dtype=object), allow_pickle=True)
    path = tar(tmp_path / "x.tar", ("a", {"npy": buffer.getvalue(), "txt": b"x"}))
    assert keys(module("unused", path, max_broken=1).val_dataloader()) == []


def test_a_module_without_model_says_what_it_lacks(tmp_path):
    with pytest.raises(RuntimeError, match="attach"):
        CC3M(shards(tmp_path / "s"), workers=0).train_dataloader()
    assert module("unused").val_dataloader() == []


# --- under Lightning ------------------------------------------------------------------------------------------------


class Vision(nn.Module):
    transform = staticmethod(transform)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision, self.tokenizer = Vision(), Tokenizer()


class Recorder(pl.LightningModule):
    """Takes a step with each batch and remembers the keys it saw."""

    def __init__(self):
        super().__init__()
        self.model, self.weight, self.seen, self.validated = Model(), nn.Parameter(torch.zeros(1)), [], []

    def training_step(self, batch):
        self.seen.append((self.current_epoch, batch.keys))
        return self.weight.sum()

    def validation_step(self, batch):
        self.validated += batch.keys

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, data, resume=None, saved=None, **named):
    recorder = Recorder()
    saved = saved or pl.callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(callbacks=[saved], num_sanity_val_steps=0, **quiet, **named)
    trainer.fit(recorder, data, ckpt_path=resume)
    return recorder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("workers", "sizes"), [(0, True), (2, True), (0, False), (2, False)])
def test_a_run_taken_up_in_mid_epoch_sees_what_it_would_have_seen(tmp_path, workers, sizes):
    folder = shards(tmp_path / "s", bad=(2, 11))
    if not sizes:  # Lightning then reads one batch ahead
        (tmp_path / "s/sizes.json").unlink()
    options = {"batch_size": 4, "workers": workers, "max_broken": 0.2}
    whole = fit(tmp_path / "a", CC3M(folder, folder, **options), max_epochs=2)
    assert whole.validated == 2 * [f"k{i:03d}" for i in range(24) if i not in (2, 11)]
    first, second = ([row for epoch, row in whole.seen if epoch == number] for number in (0, 1))
    assert len(first) >= 4 and first != second
    for step in (3, len(first), len(first) + 1):
        rest = fit(tmp_path / "b", CC3M(folder, None, **options), tmp_path / f"a/step={step}.ckpt", max_epochs=2)
        assert rest.seen == whole.seen[step:], step


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sizes", [True, False])
def test_a_run_taken_up_at_an_epochs_end_goes_on_with_the_next(tmp_path, sizes):
    folder = shards(tmp_path / "s")
    if not sizes:
        (tmp_path / "s/sizes.json").unlink()
    options = {"batch_size": 4, "workers": 0}
    saved = pl.callbacks.ModelCheckpoint(tmp_path / "a", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = fit(tmp_path / "a", CC3M(folder, None, **options), max_epochs=3, saved=saved)
    rest = fit(tmp_path / "b", CC3M(folder, None, **options), tmp_path / "a/epoch=0.ckpt", max_epochs=3)
    assert rest.seen == [row for row in whole.seen if row[0] > 0]


@pytest.mark.filterwarnings("ignore")
def test_lightning_ends_an_epoch_of_unknown_length(tmp_path):
    folder = shards(tmp_path / "s")
    (tmp_path / "s/sizes.json").unlink()
    recorder = fit(tmp_path / "a", CC3M(folder, folder, 5, workers=0), max_epochs=2)
    assert [epoch for epoch, _ in recorder.seen] == [0] * 4 + [1] * 4
    assert len(recorder.validated) == 48


# --- several captions an image ----------------------------------------------------------------------------------------


def said(loader):
    """Key -> the caption of an epoch."""
    return {key: text for batch in loader for key, text in zip(batch.keys, batch.captions, strict=True)}


def test_an_image_of_several_captions_is_one_sample_and_each_caption_comes_once_in_as_many_epochs(tmp_path):
    folder = captioned(tmp_path / "s")
    loader = module(folder, seed=3).train_dataloader()
    assert len(loader) == 6
    epochs = [said(loader) for _ in range(10)]
    assert all(len(epoch) == 24 for epoch in epochs)
    for key in epochs[0]:
        texts = {f"{int(key[1:])}.{j}" for j in range(5)}
        assert {epoch[key] for epoch in epochs[:5]} == {epoch[key] for epoch in epochs[5:]} == texts
    orders = {tuple(epoch[key][-1] for epoch in epochs) for key in epochs[0]}
    assert len(orders) > 20, "each image has an order of its own"


def test_the_drawn_caption_follows_from_seed_epoch_and_key_alone(tmp_path):
    folder = captioned(tmp_path / "s")
    one = module(folder, seed=3).train_dataloader()
    first, second = said(one), said(one)
    other = module(folder, seed=3, workers=2, batch_size=6, shuffle=0).train_dataloader()
    assert [said(other), said(other)] == [first, second] and first != second
    assert said(module(folder, seed=4).train_dataloader()) != first
    later = module(folder, seed=3).train_dataloader()
    later.epoch = 1
    assert said(later) == second


def test_a_further_pass_of_an_epoch_draws_anew(tmp_path):
    loader = module(captioned(tmp_path / "s"), samples_per_epoch=48, shuffle=0).train_dataloader()
    texts = [text for batch in loader for text in batch.captions]
    assert [text.split(".")[0] for text in texts[:24]] == [text.split(".")[0] for text in texts[24:]]
    assert not any(a == b for a, b in zip(texts[:24], texts[24:], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_has_all_captions_of_an_image_or_the_first_ones(tmp_path, workers):
    folder = captioned(tmp_path / "s", 10, 3)
    (a, b, c) = module("unused", folder, workers=workers).val_dataloader()
    assert a.captions == [f"{i}.0" for i in range(4)] and a.more.captions == [f"{i}.{j}" for i in range(4) for j in (1, 2)]
    assert a.more.rows == [0, 0, 1, 1, 2, 2, 3, 3] and a.owners.tolist() == [*range(4), *a.more.rows]
    assert a.more.ids[0].tolist() == [2, *map(ord, "0.1"), 999] and a.more.lengths == [5] * 8
    assert a.pixels.shape[0] == len(a.keys) == 4 and len(c.keys) == 2
    parts = list(b.others())
    assert [len(part.rows) for part in parts] == [4, 4] and parts[1].captions == ["6.1", "6.2", "7.1", "7.2"]
    few = list(module("unused", folder, captions_per_image=2, workers=workers).val_dataloader())
    assert few[0].more.captions == [f"{i}.1" for i in range(4)]
    assert next(iter(module("unused", folder, captions_per_image=1).val_dataloader())).more is None
    assert set(said(module(folder, captions_per_image=1).train_dataloader()).values()) <= {f"{i}.0" for i in range(10)}
    with pytest.raises(UserError, match="captions_per_image is 0"):
        module("unused", captions_per_image=0)


def test_a_share_of_the_captions_is_framed_as_requests(tmp_path):
    folder, frames = (
        captioned(tmp_path / "s", 40, 3),
        [re.compile(re.escape(one).replace(r"\{\}", "(.+)")) for one in REQUESTS],
    )
    assert all(one.count("{}") == 1 for one in REQUESTS)
    plain = module(folder, seed=3).train_dataloader()
    captions = [said(plain), said(plain)]
    asking = module(folder, seed=3, requests=0.3, max_tokens=30).train_dataloader()
    epochs = [list(asking), list(asking)]
    counts = []
    for batches, drawn in zip(epochs, captions, strict=True):
        assert said(batches) == drawn, "captions are those of a run without requests"
        read = {key: text for b in batches for key, text in zip(b.keys, b.queries.captions, strict=True)}
        framed = {key for key in drawn if read[key] != drawn[key]}
        counts.append(framed)
        assert all(any((m := one.fullmatch(read[key])) and m[1] == drawn[key] for one in frames) for key in framed)
        for b in batches:
            assert b.queries.requests is None and b.queries.keys == b.keys and b.queries.pixels is b.pixels
            rows = zip(b.queries.ids.tolist(), b.queries.lengths, b.queries.captions, strict=True)
            assert all(ids[:n] == Tokenizer().caption(text, 30) for ids, n, text in rows)
            part = b.part(1, 3)
            assert part.queries.captions == b.queries.captions[1:3] and part.captions == b.captions[1:3]
            assert part.queries.ids.shape == (2, max(b.queries.lengths[1:3]))
    assert 4 <= len(counts[0]) <= 20 and counts[0] != counts[1]
    again = module(folder, seed=3, requests=0.3, max_tokens=30, workers=2, shuffle=0).train_dataloader()
    repeated = {key: text for b in again for key, text in zip(b.keys, b.queries.captions, strict=True)}
    read = {key: text for b in epochs[0] for key, text in zip(b.keys, b.queries.captions, strict=True)}
    assert {key: repeated[key] for key in read} == read, "by seed, epoch and key alone"
    assert all(b.requests is None and b.queries is b for b in module("unused", folder, requests=1.0).val_dataloader())
    with pytest.raises(UserError, match=r"data\.requests is 2"):
        module("unused", requests=2)


def test_a_request_reads_as_it_is_typed():
    made = {request("A dog in the snow .", 1.0, 0, str(key), 0) for key in range(200)}
    assert len(made) == len(REQUESTS) and {"Show me: A dog in the snow", "show me a dog in the snow"} <= made
    assert request("a {} dog", 1.0, 0, "k", 0).count("a {} dog") == 1
    assert request("a dog", 0.0, 0, "k", 0) is None and request("...", 1.0, 0, "k", 0) is None


def test_images_of_one_and_of_several_captions_mix(tmp_path):
    about = {"a": b'{"captions": ["one", " two "]}', "b": b'{"n": 1}', "c": b'{"captions": ["three"]}'}
    path = tar(tmp_path / "x.tar", *[(key, {"jpg": image(), "txt": b"txt", "json": data}) for key, data in about.items()])
    (batch,) = module("unused", path).val_dataloader()
    assert (batch.captions, batch.more.captions, batch.more.rows) == (["one", "txt", "three"], ["two"], [0])


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b'{"captions": ["a", "", " b"]}', ["a", "b"]),
        (b'{"captions": {"en": "a"}}', ["txt"]),  # another's field
        (b'{"of": {"captions": ["a"]}}', ["txt"]),
        (b'{"captions": [', ["txt"]),
        (b'{"captions": ' + b"[" * 100_000, ["txt"]),
        (b'["captions"]', ["txt"]),
        (b'{"captions": []}', "empty caption"),
        (b'{"captions": ["a", null]}', "caption is not text: NoneType"),
        (b'{"captions": ["a", "\\ud83d"]}', "caption is not UTF-8"),
        (b'{"captions": ["' + b"x" * 70_000 + b'"]}', "caption too long: 70000 bytes"),
    ],
)
def test_captions_of_a_sample(data, texts):
    raw = {"__key__": "a", "txt": b"txt", "json": data}
    if isinstance(texts, list):
        assert captions_of(raw) == texts
    else:
        with pytest.raises(BrokenSample, match=texts):
            captions_of(raw)
