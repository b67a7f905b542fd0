"""What the web demo keeps on disk: uploads and images shown, limited in number and size; the oldest give way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

TOTAL = 512 << 20  # bytes of the folder
EACH = 128 << 20  # bytes of one visitor's uploads
FILES = 4096  # files of the folder
BETWEEN = 16 << 20  # bytes written by the demo itself after which it looks again


class Kept(NamedTuple):
    """A file of the folder, the oldest first in order."""

    changed: float
    size: int
    path: str


class Shelf:
    """A folder of limited size. Threads may share it.

    Attributes:
        forget: is called with the path of each file that gave way.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.forget: Callable[[str], object] = str
        self._owners: dict[str, str] = {}
        self._written, self._lock = 0, Lock()

    def make_room(self, size: int, own_size: int = 0, visitor: str = "") -> None:
        """Remove the oldest files, a visitor's own first, until so many bytes more keep within the limits.

        own_size: those of them that are the visitor's.
        """
        with self._lock:
            files = sorted(self._files())
            self._owners = {path: self._owners[path] for _, _, path in files if path in self._owners}
            own = [file for file in files if visitor and self._owners.get(file.path) == visitor]
            gone = _oldest(own, sum(file.size for file in own) + own_size - EACH)
            rest = sorted({*files} - {*gone})
            gone += _oldest(rest, sum(file.size for file in rest) + size - TOTAL, len(rest) - FILES)
            for _, _, path in gone:
                with suppress(OSError):
                    Path(path).unlink()
                    Path(path).parent.rmdir()  # Gradio gives each upload a folder
                self.forget(path)

    def uploaded(self, visitor: str, paths: Iterable[str]) -> None:
        """Note whose files these are."""
        with self._lock:
            self._owners |= dict.fromkeys(paths, visitor)

    def wrote(self, size: int) -> None:
        """Note what the demo wrote itself."""
        self._written += size
        if self._written > BETWEEN:
            self._written = 0
            self.make_room(0)

    def _files(self) -> Iterable[Kept]:
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with suppress(OSError):
                    path = Path(folder, name)
                    about = path.stat()
                    yield Kept(about.st_mtime, about.st_size, str(path))


def _oldest(files: list[Kept], excess: int, count: int = 0) -> list[Kept]:
    """The first files that together have at least so many bytes, and are at least so many."""
    gone: list[Kept] = []
    for file in files:
        if excess <= 0 and count <= 0:
            break
        gone.append(file)
        excess, count = excess - file.size, count - 1
    return gone


@cache
def shelf_at(folder: str) -> Shelf:
    """The shelf of a folder: one for all that write there."""
    return Shelf(Path(folder))
