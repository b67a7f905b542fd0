"""The root of an index's images: files of an index are stored relative to it, so that both may move.

A stored path is an address ('https://...'), relative to the root, or absolute where it lies outside of it. In memory, and
wherever users see one, a path is absolute.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from fromage.images.locators import split_locator

NO_FILE = "^(pipe:|[^/]*:/?/)"  # no root is put in front of these
ADDRESS = re.compile(NO_FILE.encode())


def to_bytes(text: str) -> bytes:
    """A path or another text of an image as it is stored; Python's surrogates stand for bytes that are no Unicode."""
    return text.encode("utf-8", "surrogateescape")


def to_text(data: bytes) -> str:
    """The other way round."""
    return data.decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class ImageRoot:
    """Where the images of an index are.

    Attributes:
        path: the folder that stored paths are relative to, absolute; '' for none.
        former: where absolute paths are stored: the folder that `path` stands in place of; '' for none.
    """

    path: str = ""
    former: str = ""

    def located(self, stored: pa.Array) -> pa.Array:
        """Stored paths, as bytes, as they are used."""
        if not self.path:
            return stored
        if self.former:
            return _replaced(stored, _prefix(self.former), _prefix(self.path))
        whole = pc.or_(pc.starts_with(stored, b"/"), pc.match_substring_regex(stored, NO_FILE))
        return pc.if_else(whole, stored, pc.binary_join_element_wise(pa.scalar(_prefix(self.path)), stored, b""))

    def stored(self, located: pa.Array) -> pa.Array:
        """The other way round."""
        if not self.path:
            return located
        if self.former:
            return _replaced(located, _prefix(self.path), _prefix(self.former))
        return _replaced(located, _prefix(self.path), b"")

    def locate(self, stored: bytes) -> bytes:
        """One stored path as it is used."""
        if not self.path:
            return stored
        if self.former:
            return _swap(stored, _prefix(self.former), _prefix(self.path))
        return stored if stored.startswith(b"/") or ADDRESS.match(stored) else _prefix(self.path) + stored

    def path_of(self, stored: str) -> str:
        """As locate, of a text."""
        return to_text(self.locate(to_bytes(stored)))

    def store(self, located: bytes) -> bytes:
        """The other way round."""
        if not self.path:
            return located
        return _swap(located, _prefix(self.path), _prefix(self.former) if self.former else b"")


@dataclass(frozen=True)
class ImageAccess:
    """Where the images of an index are, and which of them are opened.

    Attributes:
        root: what their stored paths are relative to; None for the deepest folder that holds them all.
        own: whether the index was built here, so that what it says is the user's word (fromage.retrieval.trust).
        confined: whether its files are opened within the root alone even so: it was imported.
        within: the folder that a file must lie in to be opened; None for any.
        left_out: stored path of a file that is no image -> size, time of change and cause, as sync found it.
    """

    root: ImageRoot | None = None
    own: bool = True
    confined: bool = False
    within: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)


def common_root(paths: Iterable[pa.Array]) -> str:
    """The deepest folder that holds all files among paths, which are bytes; '' where one is relative, or none is a file."""
    ends: list[bytes] = []
    for some in paths:
        some = some.filter(pc.invert(pc.match_substring_regex(some, NO_FILE)))
        if len(some):
            ends += [*pc.min_max(some).as_py().values()]
            ends = [min(ends), max(ends)]
    if not ends or not all(end.startswith(b"/") for end in ends):
        return ""
    folders = [os.path.dirname(split_locator(os.fsdecode(end))[0]) for end in ends]  # noqa: PTH120 (as they are stored)
    return os.path.commonpath(folders)


def _prefix(folder: str) -> bytes:
    return os.fsencode(folder).rstrip(b"/") + b"/"


def _fits(rest: bytes) -> bool:
    return not rest.startswith(b"/") and not ADDRESS.match(rest)


def _swap(path: bytes, old: bytes, new: bytes) -> bytes:
    rest = path.removeprefix(old)
    return new + rest if path.startswith(old) and _fits(rest) else path


def _replaced(paths: pa.Array, old: bytes, new: bytes) -> pa.Array:
    """Paths with another prefix, where they have the old one."""
    rest = pc.binary_replace_slice(paths, 0, len(old), b"")
    fits = pc.and_(pc.starts_with(paths, old), pc.invert(pc.match_substring_regex(rest, "^/|" + NO_FILE)))
    return pc.if_else(fits, pc.binary_replace_slice(paths, 0, len(old), new), paths)
