"""Scenes: how many there are, how they are split, and that their boxes hold what was drawn."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest

from fromage.toy import scenes
from fromage.toy.scenes import (
    COLOURS,
    PIXELS,
    Scene,
    Thing,
    draw,
    sample_crowded_scene,
    sample_scene,
    sample_scenes,
)

STAR = Thing("star", "red", "big", "left")
MOON = Thing("moon", "blue", "small", "right")


def count_scenes():
    """For n objects: places C(5, n), ordered distinct shapes and colours, sizes."""
    looks = {
        n: math.perm(len(scenes.SHAPES), n) * math.perm(len(scenes.COLOURS), n) * len(scenes.SIZES) ** n for n in (1, 2, 3)
    }
    settings = len(scenes.GROUNDS) * len(scenes.TIMES)
    return sum(math.comb(len(scenes.PLACES), n) * count * settings for n, count in looks.items())


def test_there_are_more_than_a_hundred_thousand_scenes():
    assert count_scenes() > 100_000


def test_count_agrees_with_enumeration(monkeypatch):
    monkeypatch.setattr(scenes, "SHAPES", ("circle", "square", "star"))
    monkeypatch.setattr(scenes, "COLOURS", dict.fromkeys(("red", "green", "blue")))
    monkeypatch.setattr(scenes, "SIZES", dict.fromkeys(("small", "big")))
    monkeypatch.setattr(scenes, "PLACES", dict.fromkeys(("left", "right", "top")))
    monkeypatch.setattr(scenes, "GROUNDS", dict.fromkeys(("sand", "sea")))
    things = [Thing(*w) for w in itertools.product(scenes.SHAPES, scenes.COLOURS, scenes.SIZES, scenes.PLACES)]
    keys = set()
    for n in (1, 2, 3):
        for chosen in itertools.combinations(things, n):
            if all(len({getattr(t, what) for t in chosen}) == n for what in ("shape", "colour", "place")):
                keys |= {Scene(chosen, g, t).key for g in scenes.GROUNDS for t in scenes.TIMES}
    assert count_scenes() == len(keys)


def test_key_ignores_the_order_of_objects():
    assert Scene((STAR, MOON), "sea", "day").key == Scene((MOON, STAR), "sea", "day").key
    assert Scene((STAR,), "sea", "day").key != Scene((STAR,), "sea", "night").key


def test_a_tenth_of_the_scenes_is_kept_for_validation():
    drawn = [sample_scene(random.Random(i), split) for i in range(50) for split in ("train", "val")]
    assert [s.split for s in drawn] == ["train", "val"] * 50
    words = itertools.product(scenes.SHAPES, COLOURS, scenes.SIZES, scenes.PLACES)
    single = [Scene((Thing(*w),), g, t) for w in words for g in scenes.GROUNDS for t in scenes.TIMES]
    assert math.isclose(sum(s.split == "val" for s in single) / len(single), 0.1, abs_tol=0.02)


def test_sampled_scenes_differ_and_keep_their_promises():
    found = sample_scenes(random.Random(0), "train", 200, n=3)
    assert len({s.key for s in found}) == 200
    for scene in found:
        assert len({t.place for t in scene.things}) == len({t.colour for t in scene.things}) == 3
        assert len({t.shape for t in scene.things}) == 3


def test_crowded_scenes_have_two_to_four_objects_mostly_several_of_a_shape():
    found = sample_scenes(random.Random(0), "val", 600, sample_crowded_scene)
    assert len({s.key for s in found}) == 600 and {s.split for s in found} == {"val"}
    counts = Counter(len(s.things) for s in found)
    assert set(counts) == {2, 3, 4} and min(counts.values()) > 150
    assert all(len({t.place for t in s.things}) == len(s.things) for s in found)
    shapes = [[t.shape for t in s.things] for s in found]
    assert math.isclose(sum(len(set(some)) < len(some) for some in shapes) / len(found), 0.8, abs_tol=0.05)
    assert any(1 < len(set(some)) < len(some) for some in shapes)  # several of one shape, and another


def test_drawing_depends_on_scene_and_seed_alone():
    scene = Scene((STAR, MOON), "grass", "night")
    random.seed(1)
    first = draw(scene, 3)
    random.seed(2)
    again, other = draw(scene, 3), draw(scene, 4)
    assert first[0].tobytes() == again[0].tobytes() and first[1] == again[1]
    assert first[0].tobytes() != other[0].tobytes()


@pytest.mark.parametrize("sample", [sample_scene, sample_crowded_scene])
def test_boxes_hold_the_objects_and_nothing_is_drawn_outside(sample):
    for i, scene in enumerate(sample_scenes(random.Random(0), "train", 100, sample)):
        image, marks = draw(scene, i)
        pixels = np.asarray(image).astype(int)  # (PIXELS, PIXELS, 3)
        rest = np.ones((PIXELS, PIXELS), bool)
        for thing, ((x, y, w, h), outline) in zip(scene.things, marks, strict=True):
            assert x >= 0 and y >= 0 and x + w <= PIXELS + 0.5 and y + h <= PIXELS + 0.5
            rows, columns = _margin(y, h), _margin(x, w)
            inside = pixels[rows, columns]
            corners = np.concatenate(outline)  # (points, 2)
            assert np.allclose([*corners.min(0), *np.ptp(corners, 0)], (x, y, w, h), atol=0.26)
            assert (inside == COLOURS[thing.colour]).all(-1).mean() > 0.1, (scene, thing)
            rest[rows, columns] = False
        ground = np.median(pixels[rest], axis=0)
        assert np.abs(pixels[rest] - ground).max() <= 15, scene


def _margin(start: float, length: float) -> slice:
    """The pixels of an interval and one more at each end, where an outline's edge is rounded to."""
    return slice(max(0, math.floor(start) - 1), math.ceil(start + length) + 2)


def test_a_key_parses_back_to_its_scene():
    rng = random.Random(5)
    for scene in sample_scenes(rng, "train", 50):
        assert Scene.parse(scene.key).key == scene.key
