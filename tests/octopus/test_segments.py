"""Masks in COCO's formats: those of pycocotools, and nothing that is damaged reaches its C code."""

import builtins

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from fromage.errors import UserError
from fromage.octopus.segments import Mask, OddMask, read_mask, run_lengths

SQUARE = [2.0, 1.0, 6.0, 1.0, 6.0, 4.0, 2.0, 4.0]
WHOLE = {"size": [8, 10], "counts": [0, 80]}


@st.composite
def masks(draw):
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    made = np.random.default_rng(draw(st.integers(0, 99))).random((height, width)) < draw(st.floats(0.02, 1))
    made[draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] = True
    return made


@settings(max_examples=80, deadline=None)
@given(masks())
def test_run_lengths_are_read_as_they_were_written_compressed_or_not(mask):
    height, width = mask.shape
    packed = coco.encode(np.asfortranarray(mask, np.uint8))
    compressed = {"size": packed["size"], "counts": packed["counts"].decode()}
    read = [read_mask(segmentation, width, height) for segmentation in (run_lengths(mask), compressed)]
    assert read == [Mask((height, width), packed["counts"])] * 2
    assert (read[0].pixels() == mask).all()


def test_polygons_are_one_mask_and_those_without_area_are_left_out():
    other = [7, 5, 9, 5, 9, 7.5]
    mask = read_mask([SQUARE, [1, 1, 2, 2], other], 10, 8)
    theirs = coco.decode(coco.merge(coco.frPyObjects([SQUARE, other], 8, 10))).astype(bool)
    assert mask.size == (8, 10) and (mask.pixels() == theirs).all() and mask.pixels()[1:4, 2:6].all()


def test_coverage_is_the_share_of_each_cell():
    expected = torch.zeros(4, 5)
    expected[:2, 1:3] = torch.tensor([[0.5, 0.5], [1, 1]])
    torch.testing.assert_close(read_mask([SQUARE], 10, 8).coverage((4, 5)), expected)
    assert read_mask(WHOLE, 10, 8).coverage((16, 30)).eq(1).all()


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        (None, "is null, neither polygons nor run lengths"),
        ([], "is a list of nothing, neither"),
        ([SQUARE[:7]], r"\[0\] is a list, not pairs of numbers"),
        ([SQUARE, [*SQUARE[:7], "4"]], r"\[1\] is a list, not pairs"),
        ([[*SQUARE[:7], float("nan")]], "not pairs of numbers"),
        ([[*SQUARE[:6], 1e9, 4]], r"\[0\]\[6\] is 1000000000.0, far outside"),
        ([[1, 1, 2, 2]], "no polygon of three points"),
        ([[20, 1, 20, 4, 18, 4]], "covers no pixel"),
        ({"size": [8, 10], "counts": [80]}, "covers no pixel"),
        ({"size": [10, 8], "counts": [0, 80]}, r"\.size is not that of its image, 8 x 10"),
        ({"counts": [0, 80]}, r"\.size is not"),
        ({"size": [8, 10]}, r"\.counts is null, not run lengths"),
        ({"size": [8, 10], "counts": [0, 79]}, "are of 79 pixels, not of 80"),
        ({"size": [8, 10], "counts": [90, -10]}, "not run lengths"),
        ({"size": [8, 10], "counts": [True, 79]}, "not run lengths"),
        ({"size": [8, 10], "counts": ""}, "are of 0 pixels"),
        ({"size": [8, 10], "counts": "zé"}, "is a damaged text"),
        ({"size": [8, 10], "counts": "PPPPPPPPPPPPPPPP0"}, "is a damaged text"),
        ({"size": [8, 10], "counts": "0P"}, "is a text that is cut off"),
        ({"size": [8, 10], "counts": "0O"}, "not run lengths"),  # a negative run
    ],
)
def test_what_is_damaged_is_said(segmentation, said):
    with pytest.raises(OddMask, match=said):
        read_mask(segmentation, 10, 8)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(min_codepoint=44, max_codepoint=115), max_size=12))
def test_no_text_makes_a_mask_of_another_size(text):
    try:
        mask = read_mask({"size": [8, 10], "counts": text}, 10, 8)
    except OddMask:
        return
    assert mask.pixels().shape == (8, 10) and coco.area({"size": [8, 10], "counts": mask.counts}) <= 80


@pytest.mark.parametrize("size", [(10.5, 8), (1e9, 1), (40_000, 40_000)])
def test_images_that_cannot_be_have_no_mask(size):
    with pytest.raises(OddMask, match="is of an image of"):
        read_mask([SQUARE], *size)


def test_without_pycocotools_the_extra_is_named(monkeypatch):
    imported = builtins.__import__

    def missing(name, *rest):
        if name == "pycocotools":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install '\.\[masks\]' in FROMAGe's folder, or leave masks out"):
        read_mask([SQUARE], 10, 8)
