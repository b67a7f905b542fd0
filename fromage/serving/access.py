"""Who may use a server: bearer tokens from a file, and pages of other origins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fromage.errors import UserError, reason

KEY = re.compile(r"[!-~]{16,512}")  # printable ASCII without spaces
SIZE = 1 << 16  # bytes of a file of keys, at most
ORIGIN = re.compile(r"(https?://(?:[a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?)/?")


def read_keys(path: Path) -> list[str]:
    """The keys in a file, one a line. Raises UserError, which names no key, where there is none or one is no key."""
    try:
        with path.open("rb") as file:
            content = file.read(SIZE + 1)
        lines = [line.strip() for line in content.decode("ascii").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        told = reason(error) if isinstance(error, OSError) else "characters other than ASCII"
        raise UserError(f"{path}: cannot be read as keys ({told}); write one key a line") from None
    keys = [line for line in lines if line]
    if len(content) > SIZE or not keys:
        raise UserError(f"{path}: holds {'more than 64 KiB' if keys else 'no key'}; write one key a line")
    if odd := [number for number, line in enumerate(lines, 1) if line and not KEY.fullmatch(line)]:
        raise UserError(f"{path}, line {odd[0]}: a key has 16 to 512 characters and no spaces; try: openssl rand -hex 32")
    return keys


def read_origin(text: str) -> str:
    """The origin of pages that may use a server, as browsers send it. Raises UserError for anything else, such as *."""
    found = ORIGIN.fullmatch(text.strip().lower())
    if not found:
        raise UserError(f"{text}: give the origin of a page, scheme and host alone, such as https://chat.example")
    return found[1]


@dataclass(frozen=True)
class Access:
    """Who may use a server. Nothing said: whoever reaches it, and no web page of another origin.

    Attributes:
        keys: bearer tokens, of which a request must have one.
        origins: of web pages that may read answers, such as https://chat.example.
    """

    keys: Sequence[str] = field(default=(), repr=False)
    origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raise UserError for what is no origin."""
        object.__setattr__(self, "origins", tuple(map(read_origin, self.origins)))


EVERYBODY = Access()
