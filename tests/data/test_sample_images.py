import io
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from fromage.data.sample_images import ImageReader, Images, from_npy, read_images, stacked, to_npy
from fromage.errors import BrokenSample, UserError


def pixels(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def red():
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (200, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_stored_features_stand_in_for_the_image():
    image = read_images({"png": red()}, pixels)
    assert image.pixels.shape == (3, 4, 6) and image.features is None
    stored = read_images({"jpg": b"never decoded", "npy": to_npy(torch.ones(5))}, pixels)
    assert stored.pixels is None and stored.features.equal(torch.ones(5))
    with pytest.raises(BrokenSample, match="features of another width: 5, not 4"):
        read_images({"npy": to_npy(torch.ones(5))}, pixels, width=4)
    with pytest.raises(BrokenSample, match="no image"):
        read_images({"txt": b"a star"}, pixels)


def test_a_reader_takes_the_width_of_the_first_features_for_all():
    read = ImageReader(pixels)
    assert read({"png": red()}).pixels.shape == (3, 4, 6) and read.width is None
    assert len(read({"npy": to_npy(torch.ones(5))}).features) == read.width == 5
    with pytest.raises(BrokenSample, match="features of another width: 4, not 5"):
        read({"npy": to_npy(torch.ones(4))})
    assert read({"png": red()}).features is None and read.width == 5


def test_images_are_stacked_and_both_kinds_at_once_are_refused():
    image, stored = read_images({"png": red()}, pixels), Images(None, torch.arange(3.0))
    assert stacked([image, image], "k", "shards").pixels.equal(torch.stack([image.pixels] * 2))
    both = stacked([stored, stored], "k", "tuples")
    assert both.pixels is None and both.features.equal(torch.arange(3.0).expand(2, 3))
    with pytest.raises(UserError, match=r"tuples hold features, others only images \(near k\): name shards of one kind"):
        stacked([image, stored], "k", "tuples")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_npy_keeps_every_value_and_the_dtype(dtype):
    values = torch.cat([torch.randn(50), torch.tensor([0.0, -0.0, 1e-7, 6e4])]).to(dtype)
    back = from_npy(to_npy(values))
    assert back.dtype == dtype
    assert back.equal(values)


@pytest.mark.parametrize("array", [np.zeros((2, 2), "f4"), np.zeros(3, "i8"), np.array([np.nan], "f4"), np.array(["a"])])
def test_other_arrays_are_broken_features(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    with pytest.raises(BrokenSample, match="features"):
        from_npy(buffer.getvalue())


@pytest.mark.parametrize("bit", range(0, 8 * 128, 5))
def test_a_flipped_bit_of_a_header_is_a_broken_sample_or_harmless(bit):
    data = bytearray(to_npy(torch.ones(12)))
    data[bit // 8] ^= 1 << bit % 8
    with suppress(BrokenSample):
        assert from_npy(bytes(data)).ndim == 1
