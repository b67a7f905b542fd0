"""Opening an image wherever it is: a file, a member of a tar, an http(s) address."""

from __future__ import annotations

import tarfile
from pathlib import Path

from PIL import Image

from fromage.errors import BrokenSample, UserError
from fromage.images.codec import SUFFIXES, decode_image
from fromage.io import odd_member


def open_image(locator: str) -> Image.Image:
    """The RGB image at 'path.jpg', at an http(s) URL, or at 'shard.tar#key': the member key.jpg (.png, ...) within a tar.

    Raises UserError where there is none, or none that can be decoded.
    """
    if locator.startswith(("http://", "https://")):
        from fromage.images.fetch import fetch_image  # which decodes with this module

        return fetch_image(locator)
    shard, is_member, key = locator.partition(".tar#")
    try:
        if is_member and not Path(locator).is_file():
            return decode_image(_member(f"{shard}.tar", key))
        return decode_image(Path(locator).read_bytes())
    except BrokenSample as error:
        raise UserError(f"{locator}: {error}; repair or remove it") from error
    except (OSError, ValueError, tarfile.TarError) as error:  # ValueError: a null byte in the path
        raise UserError(f"{locator}: cannot be read ({error}); was it moved or deleted?") from error


def _member(shard: str, key: str) -> bytes:
    with tarfile.open(shard) as tar:
        for member in tar:
            stem, _, suffix = member.name.rpartition(".")
            if stem != key or suffix.lower() not in SUFFIXES or odd_member(member):
                continue
            if file := tar.extractfile(member):
                return file.read()
    raise UserError(f"{shard}: holds no image with the key {key}; was the shard written anew?")
