"""Preprocessing in halves is open_clip's own, to the bit."""

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from fromage.image_transform import halves


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(300, 200), (64, 64), (40, 500)])
def test_both_halves_together_are_the_whole(size, mode):
    picture = Image.effect_noise(size, 90).convert("RGB")
    whole = image_transform_v2(PreprocessCfg(size=64, resize_mode=mode), is_train=False)
    resize, normalise = halves(whole)
    pixels = resize(picture)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 64, 64) and repr(resize) == repr(whole)
    assert torch.equal(normalise(pixels.unsqueeze(0))[0], whole(picture))


def test_a_transform_of_another_kind_is_left_whole():
    assert halves(len) == (len, None)


def test_the_tower_takes_bytes_and_normalised_pixels(toy_model):
    picture = Image.effect_noise((90, 70), 90).convert("RGB")
    whole = toy_model.vision.transform.whole
    rows = [toy_model.vision(pixels.unsqueeze(0)) for pixels in (toy_model.vision.transform(picture), whole(picture))]
    assert torch.equal(*rows)
