"""What goes to a terminal: lines of text, and images where it can draw them."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Callable, Mapping
from typing import TextIO

from PIL import Image

from fromage.images.codec import small, to_png
from fromage.printable import PrintableStream, one_line

SIDE = 240  # pixels of a drawn image's longer side, at most
CHUNK = 4096  # characters of base64 in one escape sequence of kitty's protocol
ITERM, KITTY = ("iTerm.app", "WezTerm"), ("xterm-kitty", "xterm-ghostty")
KONSOLE = 220400  # KONSOLE_VERSION of the first one that draws


def iterm(png: bytes) -> str:
    """An image in the inline image protocol of iTerm2, which WezTerm and Konsole know too.

    Source: https://iterm2.com/documentation-images.html
    """
    return f"\x1b]1337;File=inline=1;preserveAspectRatio=1;size={len(png)}:{base64.b64encode(png).decode()}\a"


def kitty(png: bytes) -> str:
    """An image in kitty's graphics protocol: in chunks, and without an answer from the terminal (q=2).

    Source: https://sw.kovidgoyal.net/kitty/graphics-protocol
    """
    data = base64.b64encode(png).decode()
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    heads = ["a=T,f=100,q=2,m=1", *["q=2,m=1"] * (len(chunks) - 1)]
    heads[-1] = heads[-1].replace("m=1", "m=0")  # the last
    return "".join(f"\x1b_G{head};{chunk}\x1b\\" for head, chunk in zip(heads, chunks, strict=True))


def protocol(environ: Mapping[str, str]) -> Callable[[bytes], str] | None:
    """How the terminal of these environment variables draws a PNG; None if it does not, or is not known to."""
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if term.startswith(("screen", "tmux", "dumb")):  # what lies between passes no images on
        return None
    konsole = environ.get("KONSOLE_VERSION", "")
    if program in ITERM or (konsole.isdecimal() and int(konsole) >= KONSOLE and not program):
        return iterm
    return kitty if term in KITTY or ("KITTY_WINDOW_ID" in environ and not program) else None


class Screen:
    """Lines and images, one below the other.

    Attributes:
        fresh: whether the cursor stands at the beginning of a line.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        """out: standard output, unless given."""
        self.out, self.fresh = PrintableStream(out or sys.stdout), True
        self.draw = protocol(os.environ) if self.out.isatty() else None

    def say(self, text: str) -> None:
        """Text as it comes; a line does not begin with a space."""
        text = text.lstrip() if self.fresh else text
        if text:
            self._write(text)
            self.fresh = text.endswith("\n")

    def line(self, text: str = "") -> None:
        """A line of its own; without text, the end of one that was begun."""
        self._write("" if self.fresh else "\n")
        self._write(one_line(text) + "\n" if text else "")
        self.fresh = True

    def complain(self, text: str) -> None:
        """A line on standard error."""
        self.line()
        print(f"fromage: {one_line(text)}", file=PrintableStream(sys.stderr), flush=True)

    def image(self, image: Image.Image) -> None:
        """Draw an image below, where the terminal can."""
        if self.draw:
            self.out.raw.write(self.draw(to_png(small(image, SIDE))) + "\n")
            self.out.flush()

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()
