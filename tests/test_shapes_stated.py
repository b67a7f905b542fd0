"""Shapes are stated where they change: at least 20 per 1,000 lines of the packages that compute with tensors."""

import re
from pathlib import Path

import pytest

import fromage

LEAST = 20  # lines that state a shape, per 1,000
GROUP = re.compile(r"\(((?:[^()]|\([^()]*\))*)\)")  # what stands in parentheses, others within it included
TERM = r"(?:\d*[A-Za-z]'?|\d+)"  # a letter of the legend, a number, or both
DIMENSION = re.compile(rf"\.\.\.|\*[a-z.]+|\(*{TERM}(?:[ +*/()-]+{TERM})*\)*|")  # or a product or sum of them


def prose(text):
    """The lines of a module that are comments or docstrings, or end in a comment: what follows # or stands in quotes."""
    inside = False
    for line in text.splitlines():
        quotes = line.count('"""')
        if inside or quotes:
            yield line
        elif "#" in line:
            yield line[line.index("#") :]
        inside ^= quotes == 1


def is_shape(group):
    """Whether 'B, T, d' or 'N,' is one: at least one comma, and only dimensions between commas."""
    dimensions = [part.strip() for part in group.split(",")]
    return len(dimensions) > 1 and dimensions[0] != "" and all(map(DIMENSION.fullmatch, dimensions))


def stated(text):
    return sum(any(map(is_shape, GROUP.findall(line))) for line in prose(text))


@pytest.mark.parametrize("package", ["models", "training", "retrieval", "generation"])
def test_shapes_are_stated(package):
    texts = [path.read_text("utf-8") for path in (Path(fromage.__file__).parent / package).rglob("*.py")]
    shapes, lines = sum(map(stated, texts)), sum(len(text.splitlines()) for text in texts)
    assert 1000 * shapes >= LEAST * lines, f"{package}: {shapes} shapes in {lines} lines; state more, or fewer lines"


def test_what_counts_as_a_shape():
    yes = [
        "(B, T, d)",
        "(N,)",
        "(B / 2, 2 (k + T))",
        "(3, H, W)",
        "(..., V + 2)",
        "(L, B, N, 3)",
        "(W B, q)",
        "(S, H', T + 1, e)",
    ]
    assert [text for text in yes if not stated(f"x = y  # {text}")] == []
    no = [
        "# (Chen et al., 2016)",
        "# (22 MB, lossless)",
        "# (said, answered)",
        "# as (B) has it, or (,)",
        "x = f(B, T, d)",
        "x = 1  # one (of two, or more) things",
        "x = y  # see (Gao et al., 2021)",
        "# (first, last)",
    ]
    assert [text for text in no if stated(text)] == []
    assert stated('"""(B, T) ids ->\n(B, T, d)\n"""\nx = (B, T)') == 2
