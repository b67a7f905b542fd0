"""Contact sheets: labelled images under the queries they answer, on one page."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from math import ceil

from PIL import Image, ImageDraw, ImageFont, ImageOps

from fromage.printable import printable

MARGIN, GAP, MAX_COLUMNS, MIN_WIDTH = 24, 16, 10, 480  # pixels, but for the number of columns
TILE = 160  # pixels of an image's square
WHITE, INK, GREY, PALE, RULE = (255, 255, 255), (28, 30, 34), (112, 116, 124), (240, 241, 243), (222, 224, 228)
WIDE_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf")  # where the system has one
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(rows: Sequence[tuple[str, Sequence[tuple[Image.Image | None, str]]]], tile: int = TILE) -> Image.Image:
    """One row of labelled images under each query.

    An image None becomes a grey tile. A label's first line is dark (rank, score), what follows it grey (caption).

    Args:
        rows: (query, its images with their labels) each.
        tile: side in pixels of the square that an image is fitted into.
    """
    columns = max(1, min(MAX_COLUMNS, max((len(images) for _, images in rows), default=1)))
    width = max(MIN_WIDTH, columns * (tile + GAP) - GAP)
    blocks: list[Image.Image] = []
    for query, images in rows:
        blocks += [Image.new("RGB", (width, 1), RULE)] if blocks else []
        blocks += [_text_block(query, 18, width, 4, INK)]
        cells = [_cell(image, label, tile) for image, label in images]
        blocks += [_beside(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    return ImageOps.expand(_stack(blocks, width, GAP), MARGIN, WHITE)


def _cell(image: Image.Image | None, label: str, tile: int) -> Image.Image:
    first, _, rest = label.partition("\n")
    texts = [_text_block(first, 14, tile, 2, INK), _text_block(rest, 12, tile, 3, GREY)]
    return _stack([_frame(image, tile), *[text for text in texts if text.height > 1]], tile, 4)


def _frame(image: Image.Image | None, tile: int) -> Image.Image:
    frame = Image.new("RGB", (tile, tile), PALE if image else RULE)
    if image is None:
        ImageDraw.Draw(frame).text((tile / 2, tile / 2), "missing", GREY, _font(14), anchor="mm")
        return frame
    width, height = (max(1, round(side * tile / max(image.size))) for side in image.size)
    inner = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    frame.paste(inner, ((tile - width) // 2, (tile - height) // 2))
    return frame


@cache
def _font(size: int, ascii_only: bool = True) -> Font:
    """Pillow's own font, which draws boxes for what is not ASCII: for such text a font of the system, if there is one."""
    for name in () if ascii_only else WIDE_FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _text_block(text: str, size: int, width: int, max_lines: int, colour: tuple[int, int, int]) -> Image.Image:
    font = _font(size, text.isascii())
    lines, leading = _wrap(text, font, width, max_lines), round(size * 1.3)
    block = Image.new("RGB", (width, max(1, leading * len(lines))), WHITE)
    for i, line in enumerate(lines):
        ImageDraw.Draw(block).text((0, leading * (i + 0.5)), line, colour, font, anchor="lm")
    return block


def _wrap(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """Lines no wider than width pixels, broken at spaces where there are any; what does not fit ends in an ellipsis."""
    left = " ".join(printable(text[:2000], mark=" ").split())
    lines: list[str] = []
    while left and len(lines) < max_lines:
        fits = max(1, bisect_right(range(len(left) + 1), width, key=lambda n: ceil(font.getlength(left[:n]))) - 1)
        cut = fits if fits >= len(left) else left.rfind(" ", 0, fits + 1)
        cut = cut if cut > 0 else fits
        lines.append(left[:cut].rstrip())
        left = left[cut:].lstrip()
    if left:
        while lines[-1] and font.getlength(lines[-1] + "...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "..."
    return lines


def _beside(cells: Sequence[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (sum(c.width + GAP for c in cells) - GAP, max(c.height for c in cells)), WHITE)
    left = 0
    for cell in cells:
        row.paste(cell, (left, 0))
        left += cell.width + GAP
    return row


def _stack(blocks: Sequence[Image.Image], width: int, gap: int) -> Image.Image:
    stack = Image.new("RGB", (width, max(1, sum(b.height + gap for b in blocks) - gap)), WHITE)
    top = 0
    for block in blocks:
        stack.paste(block, (0, top))
        top += block.height + gap
    return stack
