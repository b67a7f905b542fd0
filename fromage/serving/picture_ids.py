"""Names for the pictures of an index that do not tell where they lie, and the pictures by these names."""

from __future__ import annotations

from PIL import Image

from fromage.errors import UserError
from fromage.index import ImageIndex
from fromage.item_table import picture_id
from fromage.pictures import open_picture


class Gone(UserError):
    """A picture of the index that cannot be opened any more."""


class PictureIds:
    """Finds and opens the pictures of an index by their ids, and no other file."""

    def __init__(self, index: ImageIndex | None) -> None:
        self._find = index.finder() if index else lambda _: None

    def of(self, path: str) -> str:
        """The id of a picture."""
        return picture_id(path.encode("utf-8", "surrogateescape"))

    def open(self, name: str) -> Image.Image:
        """The picture. Raises UserError where there is none, Gone where there was one; neither tells its path."""
        item = self._find(name)
        if item is None:
            raise UserError(f"picture {name}: the index has none of this id; send back ids as they came")
        try:
            return open_picture(item.path)
        except UserError:
            raise Gone(f"picture {name}: cannot be opened any more; choose another one") from None
