"""Names for the images of an index that do not tell where they lie, and the images by these names."""

from __future__ import annotations

from PIL import Image

from fromage.errors import UserError
from fromage.images.open import open_image
from fromage.retrieval.faiss_index import ImageIndex
from fromage.retrieval.item_table import image_id


class Gone(UserError):
    """An image of the index that cannot be opened any more."""


class ImageIds:
    """Finds and opens the images of an index by their ids, and no other file."""

    def __init__(self, index: ImageIndex | None) -> None:
        self._find = index.finder() if index else lambda _: None

    def of(self, path: str) -> str:
        """The id of an image."""
        return image_id(path.encode("utf-8", "surrogateescape"))

    def open(self, name: str) -> Image.Image:
        """The image. Raises UserError where there is none, Gone where there was one; neither tells its path."""
        item = self._find(name)
        if item is None:
            raise UserError(f"image {name}: the index has none of this id; send back ids as they came")
        try:
            return open_image(item.path)
        except UserError:
            raise Gone(f"image {name}: cannot be opened any more; choose another one") from None
