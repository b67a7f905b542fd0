"""Tuples: JSON lines to shards, shards to batches, stored features, bad input, resuming."""

import json

import pytest
import torch
from PIL import Image
from test_features import Vision

from fromage.data.datamodule import CC3M
from fromage.data.features import store_features
from fromage.data.shard_names import expand
from fromage.data.shards import read_shard
from fromage.data.tokenizer import PromptTokenizer, ret_tokens
from fromage.data.tuple_packing import pack_tuples
from fromage.data.tuples import composed_ids
from fromage.errors import UserError
from fromage.models.frozen import TOY


@pytest.fixture(scope="module")
def tokenizer():
    return PromptTokenizer(str(TOY / "opt"), ret_tokens(2))


def jpeg(path, red):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (red, 0, 0)).save(path, "JPEG")


def lines(folder, n=12, targets=(), **over):
    """Tuple i is of an image whose red is i; those in targets have one of red 100 + i. Returns the file."""
    entries = []
    for i in range(n):
        jpeg(folder / f"{i}.jpg", i)
        entries.append({"image": f"{i}.jpg", "caption": f"a red {i}.", "condition": "but at night."})
        entries[-1] |= {"target_caption": f"a red {i} at night."} | over
        if i in targets:
            jpeg(folder / f"t{i}.jpg", 100 + i)
            entries[-1]["target_image"] = f"t{i}.jpg"
    (folder / "t.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder / "t.jsonl"


def loader(folder, tokenizer, pairs, **named):
    data = CC3M(str(pairs), train_tuples=str(folder), **({"batch_size": 4, "workers": 0, "max_tokens": 12} | named))
    data.attach(Vision().transform, tokenizer)
    return data.train_dataloader()


@pytest.fixture
def packed(tmp_path):
    pack_tuples(lines(tmp_path / "a", targets=(1, 3, 5, 7, 9, 11)), tmp_path / "tuples", per_shard=5)
    return tmp_path / "tuples"


def test_packing(packed):
    raws = [raw for shard in sorted(packed.glob("*.tar")) for raw in read_shard(str(shard), print)]
    assert len(raws) == 12 and raws[0].keys() == {"__key__", "jpg", "txt", "json"}
    assert raws[1].keys() == {"__key__", "jpg", "txt", "json", "target.jpg"} and raws[1]["txt"] == b"a red 1."
    said = json.loads(raws[1]["json"])
    assert (said["condition"], said["target_caption"]) == ("but at night.", "a red 1 at night.")
    report = json.loads((packed / "report.json").read_text())
    assert report["images"] == 12 and not report["skipped"]


def test_lines_that_are_no_tuple_are_named(tmp_path):
    path = lines(tmp_path, 3)
    good = json.loads(path.read_text().splitlines()[0])
    bad = [{"condition": " "}, {"target_caption": None}, {"caption": ""}, {"image": 3}, {"target_image": 4}]
    bad += [{"image": "none.jpg"}, {"target_image": "none.jpg"}]
    path.write_text(path.read_text() + "".join(json.dumps(good | odd) + "\n" for odd in bad) + "{\n\n[]\n")
    report = pack_tuples(path, tmp_path / "out")
    assert report.images == 3
    assert report.names == {
        "no condition, or an empty one": ["line 4"],
        "no target caption, or an empty one": ["line 5"],
        "no caption, or an empty one": ["line 6"],
        "no image": ["line 7", "line 13"],
        "target_image is no file name": ["line 8"],
        "missing image": [
            f"{n:09d} {tmp_path / name} (No such file or directory)" for n, name in ((9, "none.jpg"), (10, "0.jpg"))
        ],
        "no JSON": ["line 11"],
    }  # fmt: skip
    with pytest.raises(UserError, match=r"no tuple could be packed \(no condition"):
        pack_tuples(lines(tmp_path / "b", 2, condition=""), tmp_path / "none")
    with pytest.raises(UserError, match=r"is missing.*target_caption"):
        pack_tuples(tmp_path / "x.jsonl", tmp_path / "none")


def test_all_tuples_of_an_image_are_on_one_side(tmp_path):
    path = lines(tmp_path / "a", 30)
    path.write_text(path.read_text() * 2)
    assert pack_tuples(path, tmp_path / "out", val_fraction=0.4).images == 60
    sides = [
        {json.loads(raw["json"])["source"] for raw in read_shard(str(tmp_path / "out" / side / "00000.tar"), print)}
        for side in ("train", "val")
    ]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 30


def test_a_step_has_a_batch_of_pairs_and_one_of_tuples(packed, tokenizer):
    batches = list(loader(packed, tokenizer, packed, tuple_batch_size=3, shuffle=0))
    assert [len(batch.keys) for batch in batches] == [4, 4, 4] and [len(b.tuples.keys) for b in batches] == [3, 3, 3]
    tuples = batches[1].tuples
    assert tuples.targets == [f"a red {i} at night." for i in (3, 4, 5)]
    assert tuples.target_rows == [0, 2] and len(tuples.target_images.pixels) == 2
    assert (tuples.target_images.pixels[:, 0, 0, 0] > tuples.pixels[[0, 2], 0, 0, 0] + 0.3).all()
    condition, caption = tuples.conditions[0, : tuples.lengths[0]], tuples.captions[0, : tuples.caption_lengths[0]]
    assert condition.tolist() == tokenizer.caption("but at night.", 12)
    assert caption.tolist() == tokenizer.encode(" a red 3 at night.")[:12]
    assert next(iter(loader(packed, tokenizer, packed, target_images=False, shuffle=0))).tuples.target_rows == []
    part = tuples.part(1, 3)
    assert part.keys == tuples.keys[1:] and part.caption_lengths == tuples.caption_lengths[1:] and part.target_images is None


def test_an_epoch_goes_through_the_tuples_as_often_as_it_takes(tmp_path, packed, tokenizer):
    pack_tuples(lines(tmp_path / "b", 4), tmp_path / "few")
    seen = [key for batch in loader(tmp_path / "few", tokenizer, packed, tuple_batch_size=2) for key in batch.tuples.keys]
    assert len(seen) == 6 and len(set(seen)) == 4


def test_conditions_keep_ret_and_captions_follow_them(tokenizer):
    condition, caption = composed_ids(tokenizer, "but with a big red circle at the top", "a red ring.", 5)
    assert len(condition) == 5 and condition[-2:] == tokenizer.ret_ids
    assert caption == tokenizer.encode(" a red ring.")[:5]


def test_stored_features_of_both_images(packed, tokenizer, tmp_path):
    vision = Vision()
    images = [
        {data for raw in read_shard(shard, print) for kind, data in raw.items() if kind.endswith("jpg")}
        for shard in expand(str(packed))
    ]
    assert store_features(str(packed), tmp_path / "stored", vision, batch_size=2, workers=0) == 12
    assert vision.shown == sum(map(len, images)) < 18  # some stand in two tuples of a shard
    one, stored = (
        next(iter(loader(folder, tokenizer, packed, shuffle=0))).tuples for folder in (packed, tmp_path / "stored")
    )
    assert stored.pixels is None and stored.target_rows == one.target_rows == [1, 3]
    torch.testing.assert_close(stored.features, vision(one.pixels))
    torch.testing.assert_close(stored.target_images.features, vision(one.target_images.pixels))


def test_captions_are_no_tuples(tmp_path, tokenizer):
    from test_features import shards

    folder = shards(tmp_path / "captions")
    with pytest.raises(UserError, match="no tuple: no condition in member json; pack tuples with fromage shards tuples"):
        list(loader(folder, tokenizer, folder))


def test_resuming_gives_the_tuples_that_are_left(packed, tokenizer):
    def keys(batches):
        return [batch.tuples.keys for batch in batches]

    whole = loader(packed, tokenizer, packed, tuple_batch_size=3)
    want = keys(whole)
    begun = loader(packed, tokenizer, packed, tuple_batch_size=3)
    given = iter(begun)
    next(given)
    state = begun.state_dict()
    resumed = loader(packed, tokenizer, packed, tuple_batch_size=3)
    resumed.load_state_dict(state)
    assert keys(resumed) == want[1:]
    other = loader(packed, tokenizer, packed, tuple_batch_size=4)
    with pytest.raises(UserError, match=r"data.tuple_batch_size 3 \(now 4\)"):
        other.load_state_dict(state)
    del state["tuples"]
    with pytest.raises(UserError, match=r"data\.train_tuples unknown"):
        resumed.load_state_dict(state)


def test_epochs_of_unknown_length_are_refused(packed, tokenizer):
    (packed / "sizes.json").unlink()
    with pytest.raises(UserError, match=r"data.train_tuples: needs epochs of known length.*sizes.json"):
        loader(packed, tokenizer, packed)
