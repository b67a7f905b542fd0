"""Line charts: well-formed SVG in which points lie where their values say."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from matplotlib import pyplot

from fromage.images.line_chart import line_chart

SVG = "{http://www.w3.org/2000/svg}"


def points(svg):
    """(x, y) of each line, in points from the upper left corner."""
    groups = [group for group in ET.fromstring(svg).iter(f"{SVG}g") if group.get("id", "").startswith("line-")]
    paths = [path.get("d") for group in groups for path in group.findall(f"{SVG}path")]
    return [[tuple(map(float, pair)) for pair in re.findall(r"[ML] (\S+) (\S+)", path)] for path in paths]


def texts(svg):
    return [text.text for text in ET.fromstring(svg).iter(f"{SVG}text")]


def test_points_lie_where_their_values_say():
    svg = line_chart({"FROMAGe": [(1, 0), (2, 50), (5, 100)], "CLIP": [(1, 25), (5, 75)]}, "recall", "sentences", "%")
    (left, bottom), middle, (right, top) = points(svg)[0]
    assert left < right and top < bottom
    assert middle == pytest.approx((left + (right - left) / 4, (top + bottom) / 2), abs=1e-3)
    quarter = (bottom - top) / 4
    assert points(svg)[1] == [pytest.approx(p, abs=1e-3) for p in [(left, bottom - quarter), (right, top + quarter)]]
    assert {"recall", "sentences", "%", "FROMAGe", "CLIP", "0", "100"} <= set(texts(svg))


def test_the_axis_upwards_holds_0():
    assert "0" in texts(line_chart({"a": [(1000, 90), (1001, 100)]}))


@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # what an earlier test left to the collector is not meant
@pytest.mark.parametrize("lines", [{}, {"a": []}, {"a": [(3, 3)]}, {"a": [(0, 0)]}, {"a": [(1, -2), (2, -1)]}])
def test_few_points_are_drawn_within_the_page(lines):
    svg = line_chart(lines)
    _, _, width, height = map(float, ET.fromstring(svg).get("viewBox").split())
    for line in points(svg):
        assert all(0 < x < width and 0 < y < height for x, y in line)


def test_what_is_not_finite_is_left_out_and_names_are_text():
    svg = line_chart({"<b>&": [(0, 1), (1, math.nan), (2, math.inf), (3, 2)]}, title="$x_1$")
    assert len(points(svg)[0]) == 2 and {"<b>&", "$x_1$"} <= set(texts(svg))


def test_equal_charts_are_equal_files_and_no_global_figure_is_made():
    assert line_chart({"a": [(0, 1), (2, 3)]}) == line_chart({"a": [(0, 1), (2, 3)]})
    assert not pyplot.get_fignums()
