"""Ids of the images of an index, which do not reveal their paths, and the images by id."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from PIL import Image

from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.images.open import open_image
from fromage.retrieval.base import ImageIndex
from fromage.retrieval.trust import derived

ROUNDS = 6


class Gone(UserError):
    """An image of the index that can no longer be opened."""


class ImageIds:
    """Opens the images of an index by id; no other file can be opened.

    An id is the digest of a stored path, enciphered with a key that is derived from this machine's secret: nobody without it
    can check a guess of a path, and all servers of one user on one machine give an image the same id.
    """

    def __init__(self, index: ImageIndex | None) -> None:
        self._index, self._find = index, index.finder() if index is not None else lambda _: None
        self._key = derived("ids of images")

    def of(self, path: str) -> str:
        """The id of an image."""
        assert self._index is not None
        return self._enciphered(self._index.id_of(path), range(ROUNDS))

    def find(self, name: str) -> Item | None:
        """The image of an id; None for one that the index has not."""
        return self._find(self._enciphered(name, reversed(range(ROUNDS))))

    def _enciphered(self, name: str, rounds: Iterable[int]) -> str:
        """A Feistel network on 64 bits, written as 16 hex digits; with its rounds reversed it is its own inverse."""
        left, right = int(name[:8], 16), int(name[8:], 16)
        for number in rounds:
            data = bytes([number]) + right.to_bytes(4, "big")
            mixed = int.from_bytes(blake2b(data, key=self._key, digest_size=4).digest(), "big")
            left, right = right, left ^ mixed
        return f"{right:08x}{left:08x}"

    def open(self, name: str) -> Image.Image:
        """The image. Raises UserError for an unknown id, Gone if it can no longer be opened; neither names its path."""
        item = self.find(name)
        if item is None or self._index is None:
            raise UserError(f"image {name}: the index has none of this id; send back ids as they came")
        try:
            return open_image(item.path, self._index.place.within)
        except UserError:
            raise Gone(f"image {name}: cannot be opened any more; choose another one") from None
