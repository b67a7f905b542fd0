"""The contract of vision towers, by its second kind: towers of timm, against timm's own output."""

import pytest
import timm
import torch
from PIL import Image

from fromage.errors import UserError
from fromage.models.fromage import Fromage
from fromage.models.vision.base import VisionTower
from fromage.models.vision.open_clip import OpenClipText
from fromage.models.vision.registry import KINDS, check_vision, load_patches, load_vision

NAME = "test_efficientnet"  # timm's own tiny one


def test_a_tower_of_timm_gives_what_timm_gives(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model(NAME, num_classes=0).eval()
    weights = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), weights)
    tower = load_vision(f"timm:{NAME}@{weights}")
    config = timm.data.resolve_model_data_config(theirs)
    image = Image.radial_gradient("L").convert("RGB")
    pixels = timm.data.create_transform(**config, is_training=False)(image)
    with torch.no_grad():
        want = theirs(pixels[None])
    torch.testing.assert_close(tower(tower.transform(image)[None]), want, atol=1e-4, rtol=1e-4)
    assert tower.transform(image).dtype == torch.uint8 and tower.image_size == config["input_size"][1:]
    assert tower.width == theirs.num_features and tower.fingerprint()["tower"].startswith("timm:")
    assert load_vision(f"timm:{NAME}", str(weights)).fingerprint()["weights"] == tower.fingerprint()["weights"]


def test_a_model_on_a_tower_of_timm_captions_and_embeds():
    model = Fromage.load("toy", f"timm:{NAME}", random_weights=True, q=8)
    image = Image.new("RGB", (80, 60), "red")
    assert model.embed_images(model.vision(model.vision.transform(image)[None])).shape == (1, 8)
    assert model.vision.text_tower() is None


def test_open_clip_has_both_towers_and_patches():
    assert isinstance(load_vision("toy").text_tower(), OpenClipText)
    tower = load_patches("toy")
    rows, columns = tower.grid
    assert tower.shape == (rows * columns, tower.width)


def test_what_is_wrong_is_one_line():
    for name, weights, said in (("timm:no_such_model", None, "timm:no_such_model"), (f"timm:{NAME}", "/no/file", "timm:")):
        with pytest.raises(UserError, match=said):
            load_vision(name, weights)
    with pytest.raises(UserError, match="ViT-L-14: comes without weights"):
        check_vision("ViT-L-14")


def test_a_new_kind_is_a_class_and_a_line(monkeypatch):
    class Mean(VisionTower):
        @classmethod
        def load(cls, name, weights, dtype, random_weights):
            return cls(torch.nn.Linear(3, 5), lambda image: torch.zeros(3, 8, 8), name, 8)

        def encode(self, pixels):
            return self.visual(pixels.mean((2, 3)))  # (B, 3, H, W) -> (B, 5)

    monkeypatch.setitem(KINDS, "mean", Mean)
    tower = load_vision("mean:colour")
    assert tower.width == 5 and tower(torch.zeros(2, 3, 8, 8)).shape == (2, 5) and not tower.train().training
    with pytest.raises(TypeError, match="abstract"):
        VisionTower(torch.nn.Linear(3, 5), None, "none", 8)
