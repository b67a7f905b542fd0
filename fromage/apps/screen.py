"""What goes to a terminal: text without control characters, and images where it can draw them."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Callable, Mapping
from typing import TextIO

from PIL import Image

from fromage.images.codec import small, to_png

SIDE = 240  # pixels of a drawn image's longer side, at most
CHUNK = 4096  # characters of base64 in one escape sequence of kitty's protocol
ITERM, KITTY = ("iTerm.app", "WezTerm"), ("xterm-kitty", "xterm-ghostty")
KONSOLE = 220400  # KONSOLE_VERSION of the first one that draws


def printable(text: str, keep: str = "") -> str:
    """Text with a mark in the place of what is neither printable, nor a space, nor kept.

    Captions and a model's words are a stranger's: an escape sequence in them must not reach the terminal.
    """
    return "".join(c if c.isprintable() or c in keep else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


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
        self.out, self.fresh = out or sys.stdout, True
        self.draw = protocol(os.environ) if self.out.isatty() else None

    def say(self, text: str) -> None:
        """Text as it comes; a line does not begin with a space."""
        text = printable(text.lstrip() if self.fresh else text, "\n")
        if text:
            self._write(text)
            self.fresh = text.endswith("\n")

    def line(self, text: str = "") -> None:
        """A line of its own; without text, the end of one that was begun."""
        self._write("" if self.fresh else "\n")
        self._write(printable(text) + "\n" if text else "")
        self.fresh = True

    def complain(self, text: str) -> None:
        """A line on standard error."""
        self.line()
        print(f"fromage: {printable(text)}", file=sys.stderr, flush=True)

    def image(self, image: Image.Image) -> None:
        """Draw an image below, where the terminal can."""
        if self.draw:
            self._write(self.draw(to_png(small(image, SIDE))) + "\n")

    def _write(self, text: str) -> None:
        encoding = self.out.encoding or "utf-8"
        self.out.write(text.encode(encoding, "replace").decode(encoding))
        self.out.flush()
