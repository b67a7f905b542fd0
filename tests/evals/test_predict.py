"""Images that pass through an evaluation in batches: each encoded once, few held, the order of results kept."""

import gc
import weakref

import pytest
import torch
from tiny_octopus import save_untrained

from fromage.errors import UserError
from fromage.evals.options import Options
from fromage.evals.predict import ImageStream, predict
from fromage.octopus.model import Octopus, load_octopus
from fromage.octopus.sources import RefCOCO


@pytest.fixture(scope="module")
def octopus(tmp_path_factory):
    return load_octopus(str(save_untrained(tmp_path_factory.mktemp("octopus") / "last.ckpt")))


@pytest.fixture
def encoded(octopus, monkeypatch):
    """Sizes of the batches that the tower was given."""
    sizes, vision = [], octopus.vision.forward
    monkeypatch.setattr(octopus.vision, "forward", lambda pixels: sizes.append(len(pixels)) or vision(pixels))
    return sizes


@pytest.fixture
def paths(world):
    return sorted((world / "refcoco/images").glob("*.jpg"))[:9]


def test_items_of_one_image_meet_and_the_tower_sees_it_once(octopus, paths, encoded):
    items = [paths[0], paths[1], None, paths[0], paths[2], paths[1], paths[0]]
    seen = {}
    for numbers, features in ImageStream(octopus, items, Options(2)):
        seen |= dict(zip(numbers, features, strict=True))
    assert [*seen] == [0, 3, 6, 1, 5, 2, 4] and sum(encoded) == 3 and seen[2] is None
    assert torch.equal(seen[0], seen[6]) and torch.equal(seen[1], seen[5]) and not torch.equal(seen[0], seen[1])


def test_memory_holds_a_batch_of_features(octopus, paths, encoded):
    alive = []
    for _, features in ImageStream(octopus, paths, Options(2)):
        alive += map(weakref.ref, features)
        assert sum(encoded) == len(alive)  # the next batch is encoded when it is asked for
        del features
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 2
    assert len(alive) == 9


def test_features_keep_the_dtype_of_the_tower(paths):
    half = Octopus.load(num_queries=2, decoder_width=16, decoder_layers=1, heads=2, dtype="bfloat16")
    ((_, features),) = ImageStream(half, paths[:2], Options())
    assert {row.dtype for row in features} == {torch.bfloat16}


def test_too_many_broken_images_stop_the_run_before_the_rest_is_encoded(octopus, paths, encoded, tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="1 of 10 images cannot be had"):
        list(ImageStream(octopus, [paths[0], tmp_path / "torn.jpg", *paths[1:]], Options(2)))
    assert sum(encoded) == 0
    stream = ImageStream(octopus, [tmp_path / "torn.jpg", tmp_path / "torn.jpg", paths[0]], Options(1, max_lost=0.5))
    assert [numbers for numbers, _ in stream] == [[], [], [2]]
    assert stream.lost == [("broken", tmp_path / "torn.jpg")] and stream.images == {paths[0]}


def test_stored_patches_are_made_once_and_give_the_same_answers(octopus, world, encoded, tmp_path):
    files = (str(world / "refcoco" / name) for name in ("refs(unc).p", "instances.json", "images"))
    data = RefCOCO(*files, split="val", limit=5)
    runs = [predict(octopus, [data], Options(2, features=tmp_path / "patches")) for _ in range(2)]
    images = len({example.image for example in data})
    assert sum(encoded) == images == len(runs[0].images) and runs[0].lost == []
    assert [a.text for _, a in runs[0].pairs[0]] == [a.text for _, a in runs[1].pairs[0]]
    assert [example.key for example, _ in runs[0].pairs[0]] == [example.key for example in data]
