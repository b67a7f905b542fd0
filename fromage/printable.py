"""The way out to a terminal: what strangers named, captioned or wrote reaches it without control characters.

Whatever a command prints, logs or warns of passes `PrintableStream`, which takes the places of standard output and error.
"""

from __future__ import annotations

import re
from typing import Any

MARK = "\N{REPLACEMENT CHARACTER}"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # of libraries that colour their own lines
MOVES = re.compile(r"(?:\r|\n|\x1b\[A)*\x1b\[A(?:\r|\n|\x1b\[A)*")  # a write of nothing else: progress bars below each other


def printable(text: str, keep: str = "", mark: str = MARK) -> str:
    """Text with a mark in the place of each character that is neither printable, nor a space, nor kept."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else " " if c.isspace() else mark for c in text)


def one_line(text: str) -> str:
    """Text without line breaks: a stranger's words begin no line of their own."""
    return " ".join(text.splitlines())


class PrintableStream:
    """A text stream in front of another one, `raw`: printable characters, line breaks and tabs pass, and what it can encode.

    Colours are taken out. A carriage return may lead a write, and a terminal may be told to go lines up by a write of its
    own: so progress bars are drawn.
    """

    raw: Any

    def __init__(self, raw: Any) -> None:
        self.raw = raw.raw if isinstance(raw, PrintableStream) else raw

    def write(self, text: str) -> int:
        """Write what of the text is printable."""
        if MOVES.fullmatch(text):
            self.raw.write(text if self.raw.isatty() else "")
            return len(text)
        first, rest = ("\r", text[1:]) if text.startswith("\r") else ("", text)
        shown, encoding = first + printable(COLOUR.sub("", rest), "\n\t"), self.raw.encoding or "utf-8"
        self.raw.write(shown if shown.isascii() else shown.encode(encoding, "replace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each of the texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)
