"""Boxes: shares of the image, reading order, as text."""

import random

import pytest

from fromage.octopus.boxes import clipped, read_spelled, reading_order, relative, spelled
from fromage.toy.questions import in_order
from fromage.toy.scenes import PIXELS, draw, sample_crowded_scene, sample_scenes


def test_shares_are_clipped_to_the_image():
    assert relative(10, 20, 30, 60, 100, 200) == (0.1, 0.1, 0.3, 0.3)
    assert relative(-5, 190, 30, 260, 100, 200) == (0.0, 0.95, 0.3, 1.0)


@pytest.mark.parametrize(
    "sides",
    [(10, 10, 10, 20), (10, 10, 20, 10), (30, 10, 20, 20), (101, 0, 120, 10), (-9, 0, 0, 5), (float("nan"), 0, 5, 5)],
)
def test_a_box_without_area_in_the_image_is_none(sides):
    assert relative(*sides, 100, 100) is None


def test_spelled_boxes_read_back():
    rng = random.Random(0)
    for _ in range(100):
        box = clipped(*(rng.uniform(-0.2, 1.2) for _ in range(4)))
        if box:
            (found,) = read_spelled(spelled(box))
            assert found == pytest.approx(box, abs=0.0005)
    assert spelled((0.1234, 0.5, 0.75, 1.0)) == "[0.123,0.500,0.750,1.000]"


def test_reading_order_of_drawn_scenes_is_that_of_their_places():
    for i, scene in enumerate(sample_scenes(random.Random(0), "train", 100, sample_crowded_scene)):
        boxes = [relative(x, y, x + w, y + h, PIXELS, PIXELS) for (x, y, w, h), _ in draw(scene, i)[1]]
        assert reading_order(boxes) == in_order(scene, range(len(boxes)))


def test_reading_order_does_not_depend_on_the_order_given():
    rng = random.Random(1)
    boxes = [(x, y, x + 0.1, y + 0.1) for x, y in ((rng.uniform(0, 0.9), rng.uniform(0, 0.9)) for _ in range(9))]
    mixed = rng.sample(boxes, 9)
    assert [boxes[i] for i in reading_order(boxes)] == [mixed[i] for i in reading_order(mixed)]
