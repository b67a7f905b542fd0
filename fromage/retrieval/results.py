"""What a search finds, and its images: those that can still be opened, on a page."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from math import inf, isfinite
from typing import Any, NamedTuple

from PIL import Image

from fromage.errors import UserError
from fromage.images.codec import small
from fromage.images.contact_sheet import contact_sheet
from fromage.images.locators import key_of, name_of
from fromage.images.open import open_image
from fromage.io import json_object

SECONDS = 15.0  # after which no further hits are tried
THREADS = 8  # that open images, for all who ask
POOL = ThreadPoolExecutor(THREADS, "images")
DEPTH = 16  # levels of an image's metadata that are kept
NOTED = 5  # notes of their own on hits that are left out


class Hit(NamedTuple):
    """An image found.

    Attributes:
        rank: starts at 1.
        score: the cosine with the query.
        path: its file, 'shard.tar#key', or address.
        row: counts from 0, in the index.
        meta: what else is known of it, as JSON; see metadata.
        within: the folder that its file must lie in to be opened; None for any.
    """

    rank: int
    score: float
    path: str
    caption: str
    row: int = -1
    meta: str = ""
    within: str | None = None

    @property
    def name(self) -> str:
        """The file name, without folders: 'red.jpg', '00000.tar#key', the end of an address."""
        return name_of(self.path)

    @property
    def key(self) -> str:
        """The key within a shard; of other images the file name without its suffix."""
        return key_of(self.path)

    @property
    def metadata(self) -> dict[str, Any]:
        """What the shard's JSON and the index's table say of the image, as JSON can say it; empty where there is none."""
        return _plain(json_object(self.meta))

    @property
    def label(self) -> str:
        """The caption, or the file name of an image without one."""
        return self.caption or self.name

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        own = {"rank": self.rank, "score": self.score, "path": self.path, "name": self.name, "key": self.key}
        return own | {"caption": self.caption, "metadata": self.metadata}

    def line(self) -> str:
        """For a list on the screen."""
        return f"  {self.rank:3d}  {self.score:.3f}  {self.path}  {self.caption}"


def _plain(value: Any, depth: int = 0) -> Any:
    """A value of JSON with sound text, finite numbers, and no more than DEPTH levels."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float) and not isfinite(value):
        return None
    if depth == DEPTH and isinstance(value, (dict, list)):
        return None
    if isinstance(value, dict):
        return {_plain(name): _plain(each, depth + 1) for name, each in value.items()}
    return [_plain(each, depth + 1) for each in value] if isinstance(value, list) else value


Opened = tuple[Hit, Image.Image]
Lost = tuple[Hit, str]  # and why it cannot be opened


def load_images(hits: Iterable[Hit], wanted: int, side: float = inf) -> tuple[list[Opened], list[Lost]]:
    """The first hits whose images can be opened, with these, and the hits in front that cannot.

    The next best takes the place of one that has gone, as long as there are hits (ImageIndex.beyond goes on to the end of
    the index) and time. The more have gone, the more are tried at once.

    Args:
        side: pixels of an image's longer side, to which it is scaled down.
    """
    opened: list[Opened] = []
    lost: list[Lost] = []
    rest, ends = iter(hits), time.monotonic() + SECONDS
    while len(opened) < wanted and time.monotonic() < ends:
        batch = list(islice(rest, wanted - len(opened) + min(len(lost), THREADS)))
        if not batch:
            break
        for hit, image in zip(batch, POOL.map(partial(_open, side=side), batch), strict=True):
            if len(opened) == wanted:
                break
            if isinstance(image, str):
                lost.append((hit, image))
            else:
                opened.append((hit, image))
    return opened, lost


def _open(hit: Hit, side: float) -> Image.Image | str:
    """The image, or why there is none."""
    try:
        return small(open_image(hit.path, hit.within), side)
    except UserError as error:
        return str(error)


def left_out(lost: Sequence[Lost]) -> list[str]:
    """A line on each of the first hits that are lost, and one on all others."""
    lines = [f"left out #{hit.rank}: {why}" for hit, why in lost[:NOTED]]
    return [*lines, f"left out {len(lost) - NOTED} more"] if len(lost) > NOTED else lines


def draw_hits(queries: Sequence[str], found: Sequence[Sequence[Opened]]) -> Image.Image:
    """A contact sheet: under each query its images with rank, score and caption."""
    rows = [[(image, f"#{hit.rank} {hit.score:.3f}\n{hit.label}") for hit, image in row] for row in found]
    return contact_sheet(list(zip(queries, rows, strict=True)))
