"""Ids of the images of an index, which do not reveal their paths, and the images by id."""

from __future__ import annotations

from PIL import Image

from fromage.errors import UserError
from fromage.images.open import open_image
from fromage.retrieval.base import ImageIndex
from fromage.retrieval.item_table import image_id


class Gone(UserError):
    """An image of the index that can no longer be opened."""


class ImageIds:
    """Opens the images of an index by id; no other file can be opened."""

    def __init__(self, index: ImageIndex | None) -> None:
        self._find = index.finder() if index is not None else lambda _: None

    def of(self, path: str) -> str:
        """The id of an image."""
        return image_id(path.encode("utf-8", "surrogateescape"))

    def open(self, name: str) -> Image.Image:
        """The image. Raises UserError for an unknown id, Gone if it can no longer be opened; neither names its path."""
        item = self._find(name)
        if item is None:
            raise UserError(f"image {name}: the index has none of this id; send back ids as they came")
        try:
            return open_image(item.path)
        except UserError:
            raise Gone(f"image {name}: cannot be opened any more; choose another one") from None
