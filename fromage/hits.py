"""What a search finds, and its pictures: those that can still be opened, on a page."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

from PIL import Image

from fromage.contact_sheet import contact_sheet
from fromage.errors import UserError
from fromage.pictures import open_picture

SPARE = 5  # hits to ask for beyond those wanted, as web addresses die
THREADS = 8


class Hit(NamedTuple):
    """A picture found. rank starts at 1; score is the cosine with the query; row counts from 0, in the index."""

    rank: int
    score: float
    path: str
    caption: str
    row: int = -1

    def line(self) -> str:
        """For a list on the screen; fromage.terminal makes it printable."""
        return f"  {self.rank:3d}  {self.score:.3f}  {self.path}  {self.caption}"


Opened = tuple[Hit, Image.Image]


def openable(hits: Sequence[Hit], wanted: int) -> tuple[list[Opened], list[str]]:
    """The first hits whose pictures can be opened, with these, and a note on each one that cannot.

    The next best takes its place: ask for more hits than are wanted. Pictures on the web are fetched several at a time.
    """
    opened: list[Opened] = []
    notes: list[str] = []
    rest = iter(hits)
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(islice(rest, max(0, wanted - len(opened)))):
            for hit, picture in zip(batch, pool.map(_open, batch), strict=True):
                if isinstance(picture, str):
                    notes.append(f"left out #{hit.rank}: {picture}")
                else:
                    opened.append((hit, picture))
    return opened, notes


def _open(hit: Hit) -> Image.Image | str:
    """The picture, or why there is none."""
    try:
        return open_picture(hit.path)
    except UserError as error:
        return str(error)


def draw_hits(queries: Sequence[str], found: Sequence[Sequence[Opened]]) -> Image.Image:
    """A contact sheet: under each query its pictures with rank, score and caption."""
    rows = [[(picture, f"#{hit.rank} {hit.score:.3f}\n{hit.caption}") for hit, picture in row] for row in found]
    return contact_sheet(list(zip(queries, rows, strict=True)))
