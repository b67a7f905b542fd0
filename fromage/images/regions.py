"""Where an image of a benchmark is: a file by its published name, or a region of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fromage.images.codec import SUFFIXES


@dataclass(frozen=True)
class Region:
    """A box of an image file, in the middle of a black square as wide as its longer side.

    Attributes:
        path: the file.
        box: left, top, right, bottom in pixels; what lies beyond the image is left out.
    """

    path: Path
    box: tuple[float, float, float, float]

    def __str__(self) -> str:
        return str(self.path)

    def cut(self, image: Image.Image) -> Image.Image:
        """The region of the whole image, RGB. Raises ValueError where nothing of it lies within the image."""
        left, top, right, bottom = self.box
        inside = max(0, left), max(0, top), min(image.width, right), min(image.height, bottom)
        part = image.convert("RGB").crop(inside)  # type: ignore[arg-type]  # Pillow rounds
        if not part.width or not part.height:
            raise ValueError(f"the box {self.box} lies outside of the image")
        side = max(part.size)
        square = Image.new("RGB", (side, side))
        square.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
        return square


Place = Path | Region


def file_at(place: Place) -> Path:
    """The file that holds an image."""
    return place.path if isinstance(place, Region) else place


def below(folder: Path, file: str) -> Path:
    """The file below the folder as a list names it; or directly in it, where the folder is the innermost one already."""
    flat = folder / Path(file).name
    return flat if flat.is_file() else folder / file


def named(folder: Path, stem: str) -> Path:
    """The image of a name without suffix: folder/STEM.jpg, or another suffix that is there."""
    paths = [folder / f"{stem}.{suffix}" for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])
