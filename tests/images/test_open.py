"""Opening images wherever they are."""

import io
import os
import tarfile

import pytest
from PIL import Image

from fromage.errors import UserError
from fromage.images.open import MAX_FILE, open_image


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


def test_only_regular_files_are_opened(tmp_path):
    """A pipe would wait for a writer for ever, a device never end."""
    os.mkfifo(tmp_path / "a.png")
    os.mkfifo(tmp_path / "0.tar")
    for name in (tmp_path / "a.png", f"{tmp_path}/0.tar#k", "/dev/zero", "/dev/null", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            open_image(str(name))
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(MAX_FILE + 1)
    with pytest.raises(UserError, match="are no image"):
        open_image(str(tmp_path / "large.png"))


def test_a_file_must_lie_in_its_folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for path in (folder / "a.png", tmp_path / "b.png"):
        Image.new("RGB", (4, 4)).save(path)
    (folder / "link.png").symlink_to(tmp_path / "b.png")
    (folder / "own.png").symlink_to(folder / "a.png")
    (tmp_path / "other").symlink_to(folder)
    for name in ("in/a.png", "in/own.png", "other/a.png"):
        assert open_image(f"{tmp_path}/{name}", folder).size == (4, 4)
        assert open_image(f"{tmp_path}/{name}", tmp_path / "other").size == (4, 4)
    for name in ("b.png", "in/../b.png", "in/link.png", "other/link.png"):
        with pytest.raises(UserError, match=r"lies outside.*--images"):
            open_image(f"{tmp_path}/{name}", folder)
        assert open_image(f"{tmp_path}/{name}").size == (4, 4)
