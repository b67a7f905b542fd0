import errno
import io
import os
import tarfile
import tracemalloc
from contextlib import suppress

import pytest
from hostile import apng, encoded, gif, text_bomb, webp
from PIL import Image, ImageFile

from fromage.errors import BrokenSample, UserError
from fromage.images.codec import MAX_ASPECT, decode_image, image_files, jpeg, small
from fromage.images.open import open_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK", "RGBA", "LA", "1", "L"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (8, 6), RED).convert(mode).save(path)
    image = open_image(str(path))
    assert (image.mode, image.size) == ("RGB", (8, 6))
    if mode in ("P", "CMYK", "RGBA"):
        assert all(abs(have - want) < 8 for have, want in zip(image.getpixel((3, 3)), RED, strict=True))


def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "b.gif", transparency=0)
    assert open_image(str(tmp_path / "a.png")).getpixel((0, 0)) == WHITE
    assert open_image(str(tmp_path / "b.gif")).getpixel((0, 0)) == WHITE


def test_sixteen_bits_keep_their_greys(tmp_path):
    Image.new("I;16", (4, 4), 128 * 256).save(tmp_path / "a.png")
    assert open_image(str(tmp_path / "a.png")).getpixel((0, 0)) == (128, 128, 128)


def test_exif_turns_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: lies on its side
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(str(tmp_path / "a.jpg")).size == (6, 8)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0no TIFF here", b"Exif\0\0II*\0"])
def test_broken_exif_is_ignored(exif):
    assert decode_image(encoded(Image.new("RGB", (8, 6)), "JPEG", exif=exif)).size == (8, 6)


def test_member_of_a_shard(tmp_path):
    png = encoded(Image.new("RGB", (4, 4), RED))
    shard = make_tar(tmp_path / "0.tar", {"x.txt": b"text", "dir/x.txt": b"text", "dir/x.png": png, "x#y.PNG": png})
    assert open_image(f"{shard}#dir/x").getpixel((0, 0)) == RED
    assert open_image(f"{shard}#x#y").getpixel((0, 0)) == RED
    for key in ("x", "y", ""):
        with pytest.raises(UserError, match="holds no image"):
            open_image(f"{shard}#{key}")


def test_a_file_may_look_like_a_member(tmp_path):
    (tmp_path / "a.tar#b").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a.tar#b" / "c.png")
    assert open_image(str(tmp_path / "a.tar#b" / "c.png")).size == (4, 4)


def test_what_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes(encoded(Image.effect_noise((64, 64), 50), "JPEG")[:300])
    (tmp_path / "no.tar").write_bytes(b"no tar")
    Image.new("1", (1, MAX_ASPECT + 1)).save(tmp_path / "narrow.png")
    for name in ("text.jpg", "cut.jpg", "no.tar#a", "gone.jpg", "gone.tar#a", "narrow.png", ".", "a\0b.jpg"):
        with pytest.raises(UserError) as error:
            open_image(str(tmp_path / name))
        assert str(error.value).startswith(str(tmp_path / name))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_not_decoded(monkeypatch):
    large, bomb = (encoded(Image.new("1", (width, 10_000))) for width in (3_000, 9_000))
    assert decode_image(encoded(Image.new("RGB", (10, 10))), max_pixels=100).size == (10, 10)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for data, limit in ((bomb, {}), (large, {"max_pixels": 25_000_000})):
        with pytest.raises(BrokenSample, match="too large"):
            decode_image(data, **limit)


def test_pillows_own_limit_speaks_as_ours(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BrokenSample, match=r"too large, of more than 25 pixels"):
        decode_image(encoded(Image.new("RGB", (10, 10))), max_pixels=25)


def test_small_images_and_jpegs_without_metadata():
    image = decode_image(encoded(Image.new("RGB", (40, 20), RED), "JPEG", comment=b"secret", icc_profile=b"secret"))
    assert small(image, 40) is image and small(image, 10).size == (10, 5) and image.size == (40, 20)
    for side in (10, 40):
        data = jpeg(image, side)
        assert Image.open(io.BytesIO(data)).size == (side, side // 2) and b"secret" not in data


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "ICNS", "PCX", "TGA", "SGI", "DDS", "JPEG2000", "EPS"])
def test_no_other_decoder_of_pillow_sees_a_file(kind, monkeypatch):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, kind)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BrokenSample, match="not JPEG, PNG, WebP, BMP or GIF"):
        decode_image(file.getvalue())


def test_a_size_is_that_of_the_pixels_and_not_what_a_header_announces(monkeypatch):
    assert decode_image(webp(9, 9)).size == (9, 9) and decode_image(gif((4, 4), (8, 8))).size == (8, 8)
    assert decode_image(apng(8, 8, (8, 8))).size == (8, 8)
    lying = gif((8, 8), (60_000, 60_000)), gif((60_000, 60_000), (8, 8)), apng(8, 8, (9_000, 9_000))
    canvas = webp(16_383, 16_383)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for data in lying:
        with pytest.raises(BrokenSample, match="undecodable"):
            decode_image(data)
    monkeypatch.setattr(Image, "open", lambda *args, **options: pytest.fail("opened: it allocates the canvas"))
    with pytest.raises(BrokenSample, match="too large"):
        decode_image(canvas)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_text_beside_the_pixels_is_not_inflated_without_end(kind):
    tracemalloc.start()
    try:
        data = text_bomb(kind)
        tracemalloc.reset_peak()
        with suppress(BrokenSample):
            decode_image(data)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_a_jpeg_of_many_scans_is_refused_and_one_of_ten_is_not():
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    data = encoded(image, "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    scan = data[at:-2]
    assert decode_image(data + b"\xff\xda" * 1000).size == (64, 64), "what follows the image does not count"
    with pytest.raises(BrokenSample, match="more than 64 scans"):
        decode_image(data[:at] + scan * 100 + b"\xff\xd9")
    with pytest.raises(BrokenSample, match="more than 64 scans"):  # a marker without a length hides none
        decode_image(data[:at] + b"\xff\x01" + scan * 100 + b"\xff\xd9")
    with pytest.raises(BrokenSample, match="segments"):
        decode_image(data[:2] + b"\xff\xfe\0\2" * 20_000 + data[2:])
    photo = encoded(image, "JPEG", exif=b"Exif\0\0" + b"\xff\xda" * 900)
    assert decode_image(photo).size == (64, 64), "a thumbnail in the metadata does not count"


@pytest.mark.parametrize("cause", [errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path, monkeypatch, cause):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").touch()
    assert [path.parent.name for path in image_files(tmp_path)] == ["a", "b"]
    real = os.scandir

    def fails(path):
        if str(path).endswith("b"):
            raise OSError(cause, os.strerror(cause), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", fails)
    if cause == errno.EACCES:  # such as lost+found
        with pytest.warns(UserWarning, match=r"folders that may not be listed are left out: .*/b$"):
            assert [path.parent.name for path in image_files(tmp_path)] == ["a"]
        return
    with pytest.raises(UserError, match=r"/b: cannot be looked into \(Input/output error\); see to its permissions"):
        image_files(tmp_path)


def test_a_folder_whose_files_cannot_be_asked_for_is_no_empty_one(tmp_path, monkeypatch):
    (tmp_path / "x.jpg").touch()

    def fails(path, **how):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "stat", fails)
        with pytest.raises(UserError, match=r"x\.jpg: cannot be looked into"):
            image_files(tmp_path)


def test_links_to_images_are_followed_and_links_to_folders_are_named(tmp_path):
    folder = tmp_path / "images"
    (tmp_path / "out").mkdir()
    folder.mkdir()
    for path in (folder / "a.jpg", tmp_path / "out" / "b.jpg"):
        path.touch()
    (folder / "c.jpg").symlink_to(tmp_path / "out" / "b.jpg")
    (folder / "d.jpg").symlink_to(tmp_path / "gone.jpg")
    assert [path.name for path in image_files(folder)] == ["a.jpg", "c.jpg"]
    (folder / "loop").symlink_to(folder)
    with pytest.warns(UserWarning, match="links to other folders are not followed: .*/loop"):
        assert [path.name for path in image_files(folder)] == ["a.jpg", "c.jpg"]
    assert image_files(tmp_path / "gone") == image_files(folder / "a.jpg") == []
