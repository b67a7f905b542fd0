"""Opening images wherever they are."""

import io
import tarfile

import pytest
from PIL import Image

from fromage.errors import UserError
from fromage.images.open import open_image


def test_a_link_in_a_shard_is_no_image(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.png", "b.png", "c.png"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "../elsewhere.png" if name != "c.png" else "c.png"
            tar.addfile(link)
        real = tarfile.TarInfo("a.png")
        real.size = len(buffer.getvalue())
        tar.addfile(real, io.BytesIO(buffer.getvalue()))
    assert open_image(f"{tmp_path}/0.tar#a").getpixel((0, 0)) == (255, 0, 0), "the file of this name, not the link"
    for key in ("b", "c"):
        with pytest.raises(UserError, match=f"holds no image with the key {key}"):
            open_image(f"{tmp_path}/0.tar#{key}")
