"""Pictures out of files, tar members and bytes: upright, in RGB, and of a size that can be handled."""

from __future__ import annotations

import io
import tarfile
from contextlib import suppress
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from fromage.errors import BrokenSample, UserError

SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
MAX_PIXELS = 89_478_485  # Pillow's own line between a large picture and a decompression bomb
STRANGERS_PIXELS = 25_000_000  # of what the web or a visitor sends: one takes up to 16 bytes a pixel to decode
MAX_ASPECT = 100  # a strip of 1 x 20,000 pixels passes the first limit, and explodes when its short side is scaled up
WHITE = (255, 255, 255)
ORIENTATION = ExifTags.Base.Orientation


def is_picture(path: Path) -> bool:
    """Whether a file name says picture; hidden files (macOS writes ._name.jpg) do not count."""
    return path.suffix[1:].lower() in SUFFIXES and not path.name.startswith(".")


def open_picture(locator: str) -> Image.Image:
    """The RGB picture at 'path.jpg', at an http(s) URL, or at 'shard.tar#key': the member key.jpg (.png, ...) within a tar.

    Raises UserError where there is none, or none that can be decoded.
    """
    if locator.startswith(("http://", "https://")):
        from fromage.remote import fetch_picture  # which decodes with this module

        return fetch_picture(locator)
    shard, is_member, key = locator.partition(".tar#")
    try:
        if is_member and not Path(locator).is_file():
            return decode_picture(_member(f"{shard}.tar", key))
        return decode_picture(Path(locator).read_bytes())
    except BrokenSample as error:
        raise UserError(f"{locator}: {error}; repair or remove it") from error
    except (OSError, ValueError, tarfile.TarError) as error:  # ValueError: a null byte in the path
        raise UserError(f"{locator}: cannot be read ({error}); was it moved or deleted?") from error


def _member(shard: str, key: str) -> bytes:
    with tarfile.open(shard) as tar:
        for member in tar:
            stem, _, suffix = member.name.rpartition(".")
            if stem == key and suffix.lower() in SUFFIXES and (file := tar.extractfile(member)):
                return file.read()
    raise UserError(f"{shard}: holds no picture with the key {key}; was the shard written anew?")


def decode_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture that a file's bytes hold, as take_in makes it. Raises BrokenSample likewise, and where there is none."""
    return take_in(opened(data, max_pixels), max_pixels)


def opened(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture that a file's bytes hold, its header read. Raises BrokenSample where there is none, or too large a one."""
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise BrokenSample("undecodable picture: no known format") from None
    except Image.DecompressionBombError:  # Pillow's limit, which lies above ours
        raise BrokenSample(f"undecodable picture: too large, of more than {max_pixels:,} pixels") from None
    except Exception as error:  # on broken bytes Pillow raises nearly anything
        raise BrokenSample(f"undecodable picture: {error}") from None
    _check_size(image, max_pixels)
    return image


def take_in(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An opened picture in RGB, upright as EXIF has it, transparency on white, an animation's first frame.

    Raises BrokenSample for one that cannot be decoded, or is beyond max_pixels or MAX_ASPECT.
    """
    _check_size(image, max_pixels)
    try:
        image.load()
        if not is_upright(image):
            with suppress(Exception):
                image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except Exception as error:
        raise BrokenSample(f"undecodable picture: {error}") from None


def is_upright(image: Image.Image) -> bool:
    """Whether an opened picture lies as EXIF says that it should be seen; one with broken EXIF does."""
    with suppress(Exception):
        return bool(image.getexif().get(ORIENTATION, 1) == 1)
    return True


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if not 0 < width * height <= max_pixels or max(width, height) > MAX_ASPECT * min(width, height):
        raise BrokenSample(f"undecodable picture: {width} x {height} pixels are too large or too narrow")


def _to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode in RGB: transparency on white, 16 bits as 8."""
    if image.mode.startswith("I;16"):  # a plain conversion would clip 16 bits to white
        image = image.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def small(picture: Image.Image, side: float) -> Image.Image:
    """The picture, or a copy whose longer side has so many pixels."""
    if max(picture.size) <= side:
        return picture
    picture = picture.copy()
    picture.thumbnail((side, side))
    return picture


def jpeg(picture: Image.Image, side: int) -> bytes:
    """An RGB picture as JPEG, without metadata, neither side longer than so many pixels."""
    file = io.BytesIO()
    small(picture, side).save(file, "JPEG", quality=85, comment=b"")  # all else is left out unless it is asked for
    return file.getvalue()
