"""Which images of an index are not there: counted before the first search, at a bounded cost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fromage.checks import ADDRESSES
from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.images.open import file_of, inside

CHECKED = 10_000  # images at most
SECONDS = 3.0  # a slow network disk ends the count
NAMED = 3


@dataclass
class Missing:
    """What was looked at.

    Attributes:
        checked: images whose files were looked for.
        gone: paths of those that are not there.
        outside: paths of those that may not be opened, since they lie outside the folder that they must lie in.
    """

    checked: int = 0
    gone: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def said(self, folder: str | Path, count: int, own: bool) -> str:
        """One line for the user; '' where all is well. folder, count and own: of the index."""
        lost = [*self.outside, *self.gone]
        if not lost:
            return ""
        of = f"{self.checked:,}" + (f" looked at, of {count:,}," if self.checked < count else "")
        some = ", ".join(lost[:NAMED]) + (", ..." if len(lost) > NAMED else "")
        if not self.outside:
            return f"{folder}: {len(lost):,} of {of} images are missing ({some}); name the folder they are in with --images"
        why = "lie outside their folder" if own else "are not opened, since the index was not built here"
        trust = "" if own else f", or believe what it says: fromage index trust {folder}"
        return f"{folder}: {len(lost):,} of {of} images {why} ({some}); name the folder of its images with --images{trust}"


def look(items: Iterable[Item], within: str | None) -> Missing:
    """Look for the files of some images; addresses are not asked. within: the folder they must lie in; None for any."""
    found, ends, known = Missing(), time.monotonic() + SECONDS, dict[Path, str]()
    for item in items:
        if time.monotonic() > ends:
            break
        if not item.path.startswith(ADDRESSES):
            found.checked += 1
            path = file_of(item.path)[0]
            if path not in known:
                known[path] = _state(path, within)
            if known[path]:
                getattr(found, known[path]).append(item.path)
    return found


def _state(path: Path, within: str | None) -> str:
    """'' for a file that may be opened, 'gone' or 'outside' for another."""
    try:
        if within is not None:
            path = inside(path, Path(within))
        return "" if os.path.isfile(path) else "gone"  # noqa: PTH113 (Path.is_file raises for a long path)
    except UserError:
        return "outside"
    except (OSError, ValueError):
        return "gone"
