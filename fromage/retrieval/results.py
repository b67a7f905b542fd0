"""What a search finds, and its images: those that can still be opened, on a page."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from math import inf
from typing import NamedTuple

from PIL import Image

from fromage.errors import UserError
from fromage.images.codec import small
from fromage.images.contact_sheet import contact_sheet
from fromage.images.open import open_image

SECONDS = 15.0  # after which no further hits are tried
THREADS = 8  # that open images, for all who ask
POOL = ThreadPoolExecutor(THREADS, "images")
NOTED = 5  # notes of their own on hits that are left out


class Hit(NamedTuple):
    """An image found. rank starts at 1; score is the cosine with the query; row counts from 0, in the index."""

    rank: int
    score: float
    path: str
    caption: str
    row: int = -1

    def line(self) -> str:
        """For a list on the screen."""
        return f"  {self.rank:3d}  {self.score:.3f}  {self.path}  {self.caption}"


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
        return small(open_image(hit.path), side)
    except UserError as error:
        return str(error)


def left_out(lost: Sequence[Lost]) -> list[str]:
    """A line on each of the first hits that are lost, and one on all others."""
    lines = [f"left out #{hit.rank}: {why}" for hit, why in lost[:NOTED]]
    return [*lines, f"left out {len(lost) - NOTED} more"] if len(lost) > NOTED else lines


def draw_hits(queries: Sequence[str], found: Sequence[Sequence[Opened]]) -> Image.Image:
    """A contact sheet: under each query its images with rank, score and caption."""
    rows = [[(image, f"#{hit.rank} {hit.score:.3f}\n{hit.caption}") for hit, image in row] for row in found]
    return contact_sheet(list(zip(queries, rows, strict=True)))
