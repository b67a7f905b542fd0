from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fromage.images.contact_sheet import _font, _wrap, contact_sheet

HARD = ["", "x" * 5000, "word " * 3000, "日本語 😀 العربية", "\ud800\x00\n\t"]
RED, WHITE = (255, 0, 0), (255, 255, 255)


def test_sheet_shows_every_image_and_says_what_is_missing():
    red, grey = Image.new("RGB", (30, 30), RED), (222, 224, 228)
    sheet = contact_sheet([("a", [(red, "1.  0.5\ncaption"), (None, "2.")]), ("b", [(red, "1.")])], tile=40)
    count = {colour: n for n, colour in sheet.getcolors(sheet.width * sheet.height)}
    assert count[RED] == 2 * 40 * 40  # scaled up to the tile
    assert count[grey] > 0.8 * 40 * 40
    assert sheet.getpixel((0, 0)) == WHITE


def test_many_images_go_on_in_further_lines():
    rows = [(None, str(i)) for i in range(23)]
    assert contact_sheet([("a", rows)], tile=32).width == contact_sheet([("a", rows[:10])], tile=32).width
    assert contact_sheet([("a", rows)], tile=32).height > 2 * 32 + contact_sheet([("a", rows[:1])], tile=32).height


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=60) | st.sampled_from(HARD), st.integers(1, 200))
def test_any_text_can_be_drawn(text, tile):
    image = Image.new("L", (3, 50))
    sheet = contact_sheet([(text, [(image, text), (None, f"{text}\n{text}")]), ("", [])], tile)
    assert sheet.width >= 2 * tile


@settings(max_examples=50, deadline=None)
@given(st.text("ab éß.", max_size=80), st.integers(30, 200), st.integers(1, 4))
def test_lines_fit_and_nothing_is_lost_before_the_ellipsis(text, width, max_lines):
    font = _font(12)
    lines = _wrap(text, font, width, max_lines)
    assert len(lines) <= max_lines
    assert all(font.getlength(line) <= width for line in lines)
    kept, whole = "".join(lines).replace(" ", ""), "".join(text.split())
    assert kept == whole or whole.startswith(kept.removesuffix("..."))


def test_empty_sheet():
    assert contact_sheet([]).size == contact_sheet([("", [])]).size
