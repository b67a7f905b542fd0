"""What reaches a terminal: text of strangers without control characters, and what progress bars need."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from fromage.printable import PrintableStream, printable


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize("text", ["plain words", "größe — 猫", "a\tb", "\ud800", "\x7f\x85\u2028\x00"])
def test_printable_text_is_left_alone_and_all_text_becomes_printable(text):
    assert printable(text).isprintable() and len(printable(text)) == len(text)
    assert not text.isprintable() or printable(text) == text


@given(st.text(st.characters(codec=None)))
def test_no_text_brings_a_control_character_through(text):
    out = Terminal()
    print(f"- {text}", file=PrintableStream(out))
    assert all(c.isprintable() or c in "\n\t" for c in out.getvalue()) and "\x1b" not in out.getvalue()


def test_a_stream_takes_colours_out_and_marks_the_rest():
    out = Terminal()
    stream = PrintableStream(PrintableStream(out))
    stream.writelines(["\x1b[1;32mgreen\x1b[0m\n", "\x1b]0;title\x07", "a\rb\n"])
    assert out.getvalue() == "green\n\N{REPLACEMENT CHARACTER}]0;title\N{REPLACEMENT CHARACTER}a b\n" and stream.raw is out


def test_what_the_terminal_cannot_encode_is_replaced():
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    print("grün \ud800", file=PrintableStream(out), flush=True)
    assert out.buffer.getvalue() == b"gr?n ?\n"


def bars(out):
    with tqdm(range(2), file=out, ascii=True) as outer:
        for _ in outer:
            list(tqdm(range(2), file=out, position=1, ascii=True))
    return out


def test_progress_bars_below_each_other_are_drawn_on_a_terminal_alone():
    assert "\r" in bars(PrintableStream(Terminal())).getvalue() and "\x1b[A" in bars(PrintableStream(Terminal())).getvalue()
    out = io.StringIO()
    assert "\x1b" not in bars(PrintableStream(out)).getvalue() and "100%" in out.getvalue()
