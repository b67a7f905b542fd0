"""Line charts: well-formed SVG in which points lie where their values say."""

import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fromage.images.line_chart import BOTTOM, LEFT, RIGHT, TOP, line_chart, ticks

SVG = "{http://www.w3.org/2000/svg}"


def points(svg):
    """(x, y) pixels of each line."""
    lines = ET.fromstring(svg).iter(f"{SVG}polyline")
    return [[tuple(map(float, pair.split(","))) for pair in line.get("points").split()] for line in lines]


def texts(svg):
    return [text.text for text in ET.fromstring(svg).iter(f"{SVG}text")]


def test_points_lie_where_their_values_say():
    svg = line_chart({"FROMAGe": [(1, 0), (2, 50), (5, 100)], "CLIP": [(1, 25), (5, 75)]}, "recall", "sentences", "%")
    (first, second) = points(svg)
    assert first[0] == (LEFT, BOTTOM) and first[-1] == (RIGHT, TOP) and first[1][1] == (TOP + BOTTOM) / 2
    assert second == [(LEFT, TOP + 0.75 * (BOTTOM - TOP)), (RIGHT, TOP + 0.25 * (BOTTOM - TOP))]
    assert {"recall", "sentences", "%", "FROMAGe", "CLIP", "0", "100"} <= set(texts(svg))


@pytest.mark.parametrize("lines", [{}, {"a": []}, {"a": [(3, 3)]}, {"a": [(0, 0)]}, {"a": [(1, -2), (2, -1)]}])
def test_few_points_are_drawn_within_the_axes(lines):
    for line in points(line_chart(lines)):
        assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in line)


def test_what_is_not_finite_is_left_out_and_names_are_text():
    svg = line_chart({"<b>&": [(0, 1), (1, math.nan), (2, math.inf), (3, 2)]})
    assert len(points(svg)[0]) == 2 and "<b>&" in texts(svg)


@given(st.lists(st.floats(-1e9, 1e9).filter(lambda v: v == 0 or abs(v) > 1e-6), min_size=1))
def test_ticks_hold_the_values(values):
    found = ticks(values)
    slack = 1e-9 * max(map(abs, found))
    assert 2 <= len(found) <= 9 and found == sorted(found)
    assert found[0] <= min(values) + slack and found[-1] >= max(values) - slack
