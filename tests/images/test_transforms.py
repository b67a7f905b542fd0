"""Preprocessing in halves is open_clip's own but for one level of 255 here and there, and for what drafts leave out."""

import io
import re
from dataclasses import fields

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.data import create_transform
from torch.nn.functional import cosine_similarity
from torchvision.transforms.functional import pil_to_tensor

from fromage.errors import BrokenSample
from fromage.images.codec import MAX_ASPECT, decode_image
from fromage.images.transforms import SPARE, Frame, decoding_as, framed_as, halves, jpeg_pixels, read_image

SIDES = st.integers(1, 9000)


def clips(**options):
    return image_transform_v2(PreprocessCfg(**options), is_train=False)


def noise(size):
    levels = np.random.default_rng(0).normal(128, 90, (size[1], size[0], 3))  # the same in every run
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def levels(pixels, whole, image):
    """How far pixels are from what open_clip's transform makes of an image, in levels of 255."""
    off = (halves(whole)[1](pixels.unsqueeze(0))[0] - whole(image)).abs()  # (3, H, W), normalised
    return off * torch.as_tensor(whole.transforms[-1].std).view(3, 1, 1) * 255


@pytest.fixture(scope="module")
def photographs(shared_data):
    return [path.read_bytes() for path in sorted((shared_data / "coco_sample" / "val2017").iterdir())[:24]]


@pytest.mark.parametrize("filter_", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(300, 200), (64, 64), (40, 500), (150, 2), (1, 1)])
def test_both_halves_together_are_the_whole(size, mode, filter_):
    whole = clips(size=64, resize_mode=mode, interpolation=filter_)
    resize, normalise = halves(whole)
    pixels = resize(image := noise(size))
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 64, 64) and repr(resize).startswith(repr(whole))
    off = levels(pixels, whole, image)
    assert off.max() < 2.01 and off.mean() < 0.05  # each direction rounds by itself; mostly one level in few pixels
    if mode == "longest":  # which is left to Pillow
        assert torch.equal(normalise(pixels.unsqueeze(0))[0], whole(image)) and repr(resize) == repr(whole)


def test_every_pretrained_tower_of_open_clip_is_read_the_quick_way():
    known, wholes, image = {field.name for field in fields(PreprocessCfg)}, {}, noise((173, 111))
    for name, tag in open_clip.list_pretrained():
        size = open_clip.get_model_config(name)["vision_cfg"].get("image_size", 224)
        options = {k: v for k, v in open_clip.get_pretrained_cfg(name, tag).items() if k in known} | {"size": size}
        wholes.setdefault(repr(options), clips(**options))
    assert len(wholes) > 5
    for whole in wholes.values():
        resize, _ = halves(whole)
        off = levels(resize(image), whole, image)
        assert resize.frame and off.max() < 2.01 and off.mean() < 0.05, whole  # 2: where it is enlarged


def test_timms_squash_is_read_the_quick_way():
    """It scales to the square and then cuts out all of it."""
    whole = create_transform((3, 64, 64), crop_mode="squash", crop_pct=1.0, interpolation="bicubic")
    resize, _ = halves(whole)
    off = levels(resize(image := noise((173, 111))), whole, image)
    assert resize.frame == Frame((64, 64), None, "bicubic") and off.max() < 1.01


def test_a_transform_of_another_kind_is_left_whole():
    assert halves(len) == (len, None) and decoding_as(len, "exact") is len


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG")])
@pytest.mark.parametrize("size", [(300, 70), (70, 300), (900, 400), (64, 64), (9, 30)])
def test_a_square_framing_is_pillows_resize_of_the_whole(size, mode, kind, tmp_path):
    noise(size).convert(mode).save(path := tmp_path / "a.image", kind)
    own = halves(clips(size=64))[0]
    square = framed_as(own, "square", (64, 64))
    want = pil_to_tensor(Image.open(path).resize((64, 64)).convert("RGB"))
    assert torch.equal(read_image(path.read_bytes(), square), want) and torch.equal(square(Image.open(path)), want)
    if size[0] != size[1]:
        assert not torch.equal(read_image(path.read_bytes(), own), want)
    assert framed_as(own, "own", (64, 64)) is own


def test_a_square_framing_is_the_towers_height_and_width_and_its_own_transform_where_that_is_whole():
    image = noise((90, 50))
    assert framed_as(halves(clips(size=64))[0], "square", (40, 30))(image).shape == (3, 40, 30)
    whole = lambda image: torch.tensor(image.size)  # noqa: E731
    assert framed_as(whole, "square", (40, 30))(image).tolist() == [30, 40]
    with pytest.raises(BrokenSample, match="undecodable"):
        read_image(jpeg(image)[:300], framed_as(len, "square", (40, 30)))


def test_the_tower_takes_bytes_and_normalised_pixels(toy_model):
    pixels = toy_model.vision.transform(noise((90, 70))).unsqueeze(0)
    assert torch.equal(toy_model.vision(pixels), toy_model.vision(toy_model.vision.normalise(pixels)))


@pytest.mark.parametrize("options", [{}, {"subsampling": 2}, {"progressive": True}, {"keep_rgb": True}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_decoded_to_pillows_bits(mode, options):
    data = jpeg(noise((101, 67)).convert(mode), **(options if mode == "RGB" else {}))
    resize = decoding_as(halves(clips(size=32))[0], "exact")
    assert torch.equal(resize.read(data), resize(decode_image(data)))
    if mode != "CMYK":
        assert torch.equal(jpeg_pixels(data, (101, 67), 1)[:3], pil_to_tensor(decode_image(data)))


@given(SIDES, SIDES, st.sampled_from([224, (224, 224), 384]))
def test_a_draft_keeps_spare_pixels_and_is_taken_wherever_it_does(width, height, size):
    frame = Frame(size, None, "bicubic")
    scale, (to_width, to_height) = frame.draft(width, height), frame.resized(width, height)
    spare = lambda scale: width >= SPARE * scale * to_width and height >= SPARE * scale * to_height  # noqa: E731
    assert scale == 1 or spare(scale)
    assert scale == 8 or not spare(2 * scale)


@pytest.mark.parametrize("size", [(513, 517), (514, 300), (1030, 771), (2055, 2049)])
def test_a_draft_lies_where_the_whole_lies(size):
    smooth = Image.effect_noise((9, 9), 200).convert("RGB").resize(size, Image.Resampling.BICUBIC)  # a shift would show
    whole = clips(size=64)
    resize, data = halves(whole)[0], jpeg(smooth)
    assert resize.frame.draft(*size) > 1
    assert levels(resize.read(data), whole, decode_image(data)).mean() < 0.3


def test_an_image_that_exif_turns_is_read_whole():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(noise((900, 600)), exif=exif)
    resize = halves(clips(size=32))[0]
    assert torch.equal(resize.read(data), resize(decode_image(data)))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "P"), ("PNG", "I;16"), ("PNG", "LA"), ("PNG", "1"), ("WEBP", "RGBA"), ("GIF", "P"), ("BMP", "RGB")],
)
def test_other_files_are_pillows(kind, mode):
    buffer = io.BytesIO()
    Image.effect_noise((60, 40), 90).convert(mode).save(buffer, kind)
    resize = halves(clips(size=32))[0]
    assert torch.equal(resize.read(buffer.getvalue()), resize(decode_image(buffer.getvalue())))


def test_a_huge_jpeg_is_read_at_an_eighth():
    resize = halves(clips(size=32))[0]
    assert resize.frame.draft(6000, 5000) == 8
    assert resize.read(jpeg(Image.new("RGB", (6000, 5000), (200, 0, 0)))).float().mean((1, 2)).sub(
        torch.tensor([200.0, 0, 0])
    ).abs().max() < 3  # fmt: skip


def test_what_is_damaged_is_for_pillow_to_judge():
    resize, data = halves(clips(size=32))[0], jpeg(noise((640, 480)))
    for broken in (data[: len(data) // 2], data[:300], b"\xff\xd8\xff", b"", jpeg(Image.new("L", (1, MAX_ASPECT + 1)))):
        with pytest.raises(BrokenSample):
            resize.read(broken)
    bent = bytearray(data)
    bent[len(bent) // 2 : len(bent) // 2 + 40] = b"U" * 40
    assert torch.equal(resize.read(bytes(bent)), resize(decode_image(bytes(bent))))
    assert jpeg_pixels(data, (64, 48), 1) is None  # the header says otherwise


def test_photographs_at_clips_size_are_open_clips_own(photographs):
    whole = clips(size=224)
    resize = halves(whole)[0]
    off = torch.stack([levels(resize.read(data), whole, decode_image(data)) for data in photographs])
    assert off.max() < 1.01 and off.mean() < 0.02  # COCO's are too small for drafts


@pytest.mark.parametrize("size", [80, 106])
def test_drafts_of_photographs_change_less_than_another_filter(photographs, size):
    whole, other = clips(size=size), halves(clips(size=size, interpolation="bilinear"))[0]
    resize, pairs = halves(whole)[0], [(data, decode_image(data)) for data in photographs]
    drafted = [(data, image) for data, image in pairs if resize.frame.draft(*image.size) > 1]
    assert len(drafted) > 10
    off = torch.stack([levels(resize.read(data), whole, image) for data, image in drafted])
    filters = torch.stack([levels(other(image), whole, image) for _, image in drafted])
    assert off.mean() < 1 and off.mean() < 0.5 * filters.mean()


def test_drafts_of_photographs_keep_their_features(toy_model, photographs):
    vision = toy_model.vision
    exact = decoding_as(vision.transform, "exact")
    rows = [vision(torch.stack([way.read(data) for data in photographs])) for way in (vision.transform, exact)]
    assert not torch.equal(*rows)
    alike = cosine_similarity(*(row - rows[1].mean(0) for row in rows))  # of what tells images apart
    assert alike.min() > 0.98 and alike.mean() > 0.998


def test_the_fingerprint_tells_decodings_apart(toy_model):
    draft, exact = toy_model.vision.fingerprint(), toy_model.vision.fingerprint("exact")
    assert {key for key in draft if draft[key] != exact[key]} == {"preprocessing"}
    assert re.search("draft$", draft["preprocessing"]) and re.search("exact$", exact["preprocessing"])
