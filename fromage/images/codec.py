"""Images out of files, tar members and bytes: upright, in RGB, and of a size that can be handled."""

from __future__ import annotations

import io
import os
import re
import warnings
from contextlib import suppress
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from fromage.errors import BrokenSample, UserError, first_few, reason

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # no other decoder of Pillow sees a file: some start programs or never end
SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
MAX_PIXELS = 89_478_485  # Pillow's own line between a large image and a decompression bomb
STRANGERS_PIXELS = 25_000_000  # of what the web or a visitor sends: one takes up to 16 bytes a pixel to decode
MAX_SCANS = 64  # of a JPEG, each a pass over all its pixels; progressive files have ten or so
MAX_SEGMENTS = 10_000  # of a JPEG, tables and metadata; read one by one before its pixels
MAX_ASPECT = 100  # a strip of 1 x 20,000 pixels passes the first limit, and explodes when its short side is scaled up
WHITE = (255, 255, 255)
ORIENTATION = ExifTags.Base.Orientation
JPEG_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")  # what has a length; \xff+ would be 28 times as slow
JPEG_SCAN, JPEG_END = 0xDA, 0xD9


def is_image(path: Path) -> bool:
    """Whether a file name says image; hidden files (macOS writes ._name.jpg) do not count."""
    return path.suffix[1:].lower() in SUFFIXES and not path.name.startswith(".")


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and the folders in it, by their names, in order; none where there is no folder.

    Links to images are followed. Links to folders are not, since these may hold one another: a warning names them, and
    folders that may not be listed (lost+found). Raises UserError where a folder cannot be listed for another reason.
    """
    files: list[Path] = []
    links: list[Path] = []
    closed: list[str] = []

    def unlisted(error: OSError) -> None:
        if isinstance(error, PermissionError):
            closed.append(str(error.filename))
        elif not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    try:
        for inside, folders, names in os.walk(folder, onerror=unlisted):
            links += [path for path in (Path(inside, name) for name in folders) if path.is_symlink()]
            files += [path for path in (Path(inside, name) for name in names) if is_image(path) and path.is_file()]
    except OSError as error:
        told = f"cannot be looked into ({reason(error)}); see to its permissions, or move it out of {folder}"
        raise UserError(f"{error.filename}: {told}") from error
    if links:
        warnings.warn(f"links to other folders are not followed: {first_few(sorted(map(str, links)))}", stacklevel=2)
    if closed:
        warnings.warn(f"folders that may not be listed are left out: {first_few(sorted(closed))}", stacklevel=2)
    return sorted(files)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image that a file's bytes hold, as take_in makes it. Raises BrokenSample as it does, and for bytes of no image."""
    return take_in(opened(data, max_pixels), max_pixels)


def opened(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image that a file's bytes hold, its header read. Raises BrokenSample where there is none, or too large a one.

    Too large is also what costs far more than its size says: a JPEG of very many scans, and a WebP whose canvas Pillow would
    allocate as it opens it.
    """
    if data.startswith(b"\xff\xd8"):
        _check_scans(data)
    elif data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X":
        _check_size((1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")), max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BrokenSample("undecodable image: not JPEG, PNG, WebP, BMP or GIF") from None
    except Image.DecompressionBombError:  # Pillow's limit, which lies above ours
        raise BrokenSample(f"undecodable image: too large, of more than {max_pixels:,} pixels") from None
    except Exception as error:  # on broken bytes Pillow raises nearly anything
        raise BrokenSample(f"undecodable image: {reason(error)}") from None
    _check_size(image.size, max_pixels)
    return image


def take_in(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An opened image in RGB, upright as EXIF has it, transparency on white, an animation's first frame.

    Raises BrokenSample for one that cannot be decoded, or is beyond max_pixels or MAX_ASPECT.
    """
    _check_size(image.size, max_pixels)
    try:
        image.load()
        if not is_upright(image):
            with suppress(Exception):
                image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except Exception as error:
        raise BrokenSample(f"undecodable image: {reason(error)}") from None


def is_upright(image: Image.Image) -> bool:
    """Whether an opened image lies as EXIF says that it should be seen; one with broken EXIF does."""
    with suppress(Exception):
        return bool(image.getexif().get(ORIENTATION, 1) == 1)
    return True


def _check_scans(data: bytes) -> None:
    """Raise BrokenSample for a JPEG of more scans or segments than a decoder should be asked to go through."""
    at, scans = 2, 0
    for _ in range(MAX_SEGMENTS):
        marker = JPEG_MARKER.search(data, at)
        if marker is None or marker[1][0] == JPEG_END:
            return
        scans += marker[1][0] == JPEG_SCAN
        if scans > MAX_SCANS:
            raise BrokenSample(f"undecodable image: a JPEG of more than {MAX_SCANS} scans")
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")  # after the segment
    raise BrokenSample(f"undecodable image: a JPEG of more than {MAX_SEGMENTS:,} segments")


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if not 0 < width * height <= max_pixels or max(width, height) > MAX_ASPECT * min(width, height):
        raise BrokenSample(f"undecodable image: {width} x {height} pixels are too large or too narrow")


def _to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB: transparency on white, 16 bits as 8."""
    if image.mode.startswith("I;16"):  # a plain conversion would clip 16 bits to white
        image = image.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def small(image: Image.Image, side: float) -> Image.Image:
    """The image, or a copy whose longer side has so many pixels."""
    if max(image.size) <= side:
        return image
    image = image.copy()
    image.thumbnail((side, side))
    return image


def jpeg(image: Image.Image, side: int) -> bytes:
    """An RGB image as JPEG, without metadata, neither side longer than so many pixels."""
    file = io.BytesIO()
    small(image, side).save(file, "JPEG", quality=85, comment=b"")  # all else is left out unless it is asked for
    return file.getvalue()


def to_png(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
