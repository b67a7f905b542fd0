"""Names for the pictures of an index that do not tell where they lie, and the pictures by these names."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

from fromage.errors import UserError
from fromage.index import ImageIndex
from fromage.pictures import open_picture

CHUNK = 1 << 14  # rows


def picture_id(path: bytes) -> str:
    """16 hex digits that change with the path; another index with the same picture has the same."""
    return hashlib.blake2b(path, digest_size=8).hexdigest()


class Gone(UserError):
    """A picture of the index that cannot be opened any more."""


class PictureIds:
    """Finds and opens the pictures of an index by their ids, and no other file."""

    def __init__(self, index: ImageIndex | None) -> None:
        """A second or two per million pictures."""
        self.index = index
        items = index.items.slices(CHUNK) if index else iter(())
        paths = (path for batch in items for path in batch.column("path").to_pylist())
        digests = np.fromiter((int(picture_id(path), 16) for path in paths), np.uint64)  # (N,)
        self._rows = np.argsort(digests, kind="stable")  # (N,)
        self._digests = digests[self._rows]

    def of(self, path: str) -> str:
        """The id of a picture."""
        return picture_id(path.encode("utf-8", "surrogateescape"))

    def open(self, name: str) -> Image.Image:
        """The picture. Raises UserError where there is none, Gone where there was one; neither tells its path."""
        row = self._find(name)
        if self.index is None or row is None:
            raise UserError(f"picture {name}: the index has none of this id; send back ids as they came")
        try:
            return open_picture(self.index.items[row].path)
        except UserError:
            raise Gone(f"picture {name}: cannot be opened any more; choose another one") from None

    def _find(self, name: str) -> int | None:
        wanted = np.uint64(int(name, 16))
        place = int(np.searchsorted(self._digests, wanted))
        return int(self._rows[place]) if place < len(self._rows) and self._digests[place] == wanted else None
