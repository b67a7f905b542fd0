"""Opening an image wherever it is: a file, a member of a tar, an http(s) address."""

from __future__ import annotations

import os
import stat
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from fromage.checks import ADDRESSES
from fromage.errors import BrokenSample, UserError, reason
from fromage.images.codec import SUFFIXES, decode_image
from fromage.images.locators import split_locator
from fromage.images.tars import plain_files

MAX_FILE = 1 << 29  # bytes of an image file; the largest that can be decoded is a BMP of 358 MB


def open_image(locator: str, within: str | Path | None = None) -> Image.Image:
    """The RGB image at 'path.jpg', at an http(s) URL, or at 'shard.tar#key': the member key.jpg (.png, ...) within a tar.

    within: the folder that a file must lie in, symbolic links followed; None for any.

    Raises UserError where there is none, none that can be decoded, no regular file, or one outside of `within`.
    """
    if locator.startswith(ADDRESSES):
        from fromage.images.fetch import fetch_image

        return fetch_image(locator)
    try:
        path, key = file_of(locator)
        if within is not None:
            path = inside(path, Path(within))
        return decode_image(read_file(path) if key is None else _member(path, key))
    except BrokenSample as error:
        raise UserError(f"{locator}: {error}; repair or remove it") from error
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:  # ValueError: a null byte in the path
        raise UserError(f"{locator}: cannot be read ({reason(error)}); was it moved or deleted?") from error


def file_of(locator: str) -> tuple[Path, str | None]:
    """The file that a locator names, and the key within it where it is a tar."""
    if os.path.isfile(locator):  # noqa: PTH113 (Path.is_file raises for a long path)
        return Path(locator), None
    file, key = split_locator(locator)
    return Path(file), key


def read_file(path: Path) -> bytes:
    """A regular file's bytes. Raises OSError for what is none (a device would block, or never end), and beyond MAX_FILE."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE:
            raise OSError(f"{size:,} bytes are no image; the limit is {MAX_FILE:,}")
        return file.read(MAX_FILE)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file. Raises OSError for what is none, without waiting for a writer of a pipe."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError("no regular file")
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def inside(path: Path, folder: Path) -> Path:
    """The path without symbolic links. Raises UserError where it leads out of a folder."""
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{path}: lies outside {folder}; name the folder of the images with --images")
    return real


def file_bytes(path: Path) -> bytes:
    """As read_file. Raises BrokenSample where that raises anything: 'missing image: why'."""
    try:
        return read_file(path)
    except OSError as error:
        raise BrokenSample(f"missing image: {reason(error)}") from None
    except ValueError:  # a null byte, or half a character
        raise BrokenSample("missing image: no name of a file") from None


def _member(shard: Path, key: str) -> bytes:
    with open_regular(shard) as file:
        for name, read in plain_files(file, mode="r"):
            stem, _, suffix = name.rpartition(".")
            if stem == key and suffix.lower() in SUFFIXES:
                return read()
    raise UserError(f"{shard}: holds no image with the key {key}; was the shard written again?")
