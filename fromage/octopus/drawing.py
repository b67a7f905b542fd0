"""Draw an answer: the boxes it points at in colour and, where asked for, their masks; other candidates in thin lines."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fromage.images.contact_sheet import INK, WHITE
from fromage.octopus.answers import GroundedAnswer
from fromage.octopus.examples import Box
from fromage.octopus.masks import at_size

# of the boxes pointed at, in turn; distinguishable by the colour-blind (Okabe and Ito)
COLOURS = ((213, 94, 0), (0, 114, 178), (240, 228, 66), (0, 158, 115), (204, 121, 167), (86, 180, 233))
OTHERS = (225, 225, 225)
SIDE = 640  # minimum length of the longer side of a drawing, in pixels
TINT = 0.5  # of a mask's colour over the image
FOREGROUND = 0.5  # score from which a query is drawn, as in the paper (figure 3)


def draw_answer(image: Image.Image, answer: GroundedAnswer, top: int | None = None, masks: bool = False) -> Image.Image:
    """An image with the boxes pointed at, numbered in the answer's order, and all other foreground in thin lines.

    So one sees recognition and answer apart. Boxes are labelled with their scores, if any; foreground are queries with a
    score from FOREGROUND on, the best `top` of them. masks: tint what the masks cover, in the colours of their boxes. A
    small image is enlarged; the given image is not changed.
    """
    page = _enlarged(image)
    for number, mask in enumerate(answer.masks if masks else []):
        cover = Image.fromarray(at_size(mask, *page.size).numpy().astype(np.uint8) * round(255 * TINT))
        page.paste(COLOURS[number % len(COLOURS)], mask=cover)
    chosen = set(answer.pointed)
    others = [(box, score) for box, score in answer.candidates if (box, score) not in chosen and score >= FOREGROUND][:top]
    drawn = [(box, f"{score:.2f}", OTHERS) for box, score in reversed(others)]  # the best one last, on top
    for number, (box, score) in reversed(list(enumerate(answer.pointed))):
        text = f"{number + 1}" + ("" if score is None else f"  {score:.2f}")
        drawn.append((box, text, COLOURS[number % len(COLOURS)]))
    for box, _, colour in drawn:
        _frame(page, box, colour, thick=colour != OTHERS)
    for label in drawn:
        _label(page, *label)
    return page


def _enlarged(image: Image.Image) -> Image.Image:
    """An RGB copy; a small image is enlarged by an integer factor to at least SIDE."""
    times = -(-SIDE // max(image.size))
    return image.convert("RGB").resize((times * image.width, times * image.height), Image.Resampling.BICUBIC)


def pixels(box: Box, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box in relative coordinates -> left, top, right, bottom in pixels of an image of this width and height."""
    left, top, right, bottom = box
    return left * size[0], top * size[1], right * size[0], bottom * size[1]


def _unit(page: Image.Image) -> int:
    """Width of a thin line in pixels."""
    return max(1, max(page.size) // 500)


def _frame(page: Image.Image, box: Box, colour: tuple[int, int, int], thick: bool) -> None:
    """The edge of a box, drawn inwards, with a dark outline around it."""
    width, unit = _unit(page) * (4 if thick else 1), _unit(page)
    left, top, right, bottom = (round(side) for side in pixels(box, page.size))
    right, bottom = max(left, min(right, page.width) - 1), max(top, min(bottom, page.height) - 1)
    drawing = ImageDraw.Draw(page)
    drawing.rectangle((left - unit, top - unit, right + unit, bottom + unit), outline=INK, width=width + 2 * unit)
    drawing.rectangle((left, top, right, bottom), outline=colour, width=width)


def _label(page: Image.Image, box: Box, text: str, colour: tuple[int, int, int]) -> None:
    """A label in the box's colour: above its upper left corner, or inside the box at the edge of the image."""
    font, drawing, gap = ImageFont.load_default(max(12, max(page.size) // 45)), ImageDraw.Draw(page), 2 * _unit(page)
    _, _, wide, high = drawing.textbbox((0, 0), text, font)
    left, top, _, _ = pixels(box, page.size)
    x, y = min(left, page.width - wide - 2 * gap), top - high - 2 * gap
    x, y = max(0, round(x)), round(y if y >= 0 else top)
    drawing.rectangle((x, y, x + wide + 2 * gap, y + high + 2 * gap), fill=colour)
    dark = sum(weight * part for weight, part in zip((0.299, 0.587, 0.114), colour, strict=True)) < 128
    drawing.text((x + gap, y + gap), text, WHITE if dark else INK, font)
