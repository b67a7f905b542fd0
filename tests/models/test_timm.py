"""Towers of timm, random, in timm's own layouts, against timm's own output: folders, files of weights, patches."""

import pickle
import shutil

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from fromage.errors import UserError
from fromage.models.vision.registry import check_vision, load_patches, load_vision, plan_vision
from fromage.models.vision.timm import _parts

NAME = "test_efficientnet"  # timm's own tiny ones
VIT = "test_vit"


class Attack:
    """Runs a command when it is read as a pickle."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.fixture(scope="module")
def whole():
    """A model with its classifier, as published weights have it."""
    torch.manual_seed(1)
    return timm.create_model(NAME).eval()


def bare(model):
    """The same without its classifier."""
    other = timm.create_model(NAME, num_classes=0).eval()
    other.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("classifier.")})
    return other


@torch.no_grad()
def test_a_folder_of_timms_own_has_its_arguments_and_its_preprocessing(timm_folder):
    theirs = timm.create_model(f"local-dir:{timm_folder}", pretrained=True, num_classes=0).eval()
    tower = load_vision(f"timm:local-dir:{timm_folder}")
    assert theirs.bn1.eps == tower.visual.bn1.eps == 0.1 and tower.image_size == (96, 96)
    assert tower.normalise.mean == [0.1, 0.2, 0.3] and tower.normalise.std == [0.5, 0.4, 0.3]
    image = Image.radial_gradient("L").convert("RGB")
    pixels = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs), is_training=False)(image)
    torch.testing.assert_close(tower(tower.transform(image)[None]), theirs(pixels[None]), atol=0.02, rtol=0.02)
    torch.testing.assert_close(tower(pixels[None]), theirs(pixels[None]))
    check_vision(f"timm:local-dir:{timm_folder}")
    assert plan_vision(f"timm:local-dir:{timm_folder}", "bfloat16").shape == tower.shape


@torch.no_grad()
@pytest.mark.parametrize("form", ["torch", "safetensors", "training", "headless"])
def test_weights_are_a_torch_file_or_safetensors_with_or_without_the_classifier(whole, timm_folder, tmp_path, form):
    state, file, pixels = whole.state_dict(), tmp_path / "w@2.bin", torch.randn(2, 3, 64, 64)
    if form == "safetensors":
        save_file(state, file)
    elif form == "training":
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, file)
    else:
        torch.save(bare(whole).state_dict() if form == "headless" else state, file)
    want = bare(whole)(pixels)
    for tower in (load_vision(f"timm:{NAME}@{file}"), load_vision(f"timm:{NAME}", str(file))):
        torch.testing.assert_close(tower(pixels), want)
    assert "state_dict" not in tower.visual.pretrained_cfg
    inside = load_vision(f"timm:local-dir:{timm_folder}@{file}")  # the folder's arguments, the file's weights
    assert inside.visual.bn1.eps == 0.1 and torch.equal(inside.visual.conv_stem.weight, whole.conv_stem.weight)


def test_a_name_is_parted_from_its_file_not_from_its_folder(timm_folder, tmp_path):
    file = tmp_path / "a@b.pth"
    file.touch()
    assert "@" in timm_folder.name
    folder = f"local-dir:{timm_folder}"
    assert _parts(f"timm:{folder}", None) == (folder, "") and _parts(f"timm:{folder}@{file}", None) == (folder, str(file))
    assert _parts(f"timm:{NAME}@{file}", None) == (NAME, str(file)) == _parts(f"timm:{NAME}", str(file))
    assert _parts("timm:hf-hub:timm/x@main", None) == ("hf-hub:timm/x@main", "")
    assert _parts(f"timm:hf-hub:timm/x@{file}", None) == ("hf-hub:timm/x", str(file))


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("name", [NAME, VIT, "test_convnext"])
def test_patches_are_timms_intermediates(name, layer):
    torch.manual_seed(0)
    tower = load_patches(f"timm:{name}", layer=layer, random_weights=True)
    pixels = torch.randn(2, 3, *tower.image_size)
    found = tower.visual.forward_intermediates(pixels, intermediates_only=True)[layer]  # (B, m, rows, columns)
    rows = found.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tower(pixels), F.layer_norm(rows, rows.shape[-1:]))
    assert tower.grid == found.shape[2:] and tower.shape == rows.shape[1:]
    halved = Image.fromarray(np.repeat(np.repeat([[0] * 300 + [255] * 300], 40, 0)[..., None], 3, 2).astype(np.uint8))
    shown, middle = tower.transform(halved), tower.image_size[1] // 2  # pressed, not cut
    assert shown[:, :, : middle - 2].max() < 20 and shown[:, :, middle + 2 :].min() > 235
    if layer == -1 and name == VIT:
        normed = F.layer_norm(tower.visual.forward_intermediates(pixels, intermediates_only=True)[-1].flatten(2).mT, (64,))
        torch.testing.assert_close(tower(pixels), normed)


def test_a_model_without_intermediates_and_a_layer_that_is_not_there(monkeypatch):
    with pytest.raises(UserError, match="has no layer 99; -1 is its last"):
        load_patches(f"timm:{VIT}", layer=99, random_weights=True)
    monkeypatch.delattr(timm.models.EfficientNet, "forward_intermediates")
    with pytest.raises(UserError, match="gives no patches; choose a ViT or a convolutional"):
        load_patches(f"timm:{NAME}", random_weights=True)


def refused(call, *args):
    with pytest.raises(UserError) as raised:
        call(*args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_damaged_and_foreign_weights_are_one_line(whole, timm_folder, tmp_path):
    ran, file = tmp_path / "ran", tmp_path / "weights.pth"
    clip = tmp_path / "clip.pt"
    for save in (torch.save, lambda what, where: where.write_bytes(pickle.dumps(what))):
        for path, name in ((file, f"timm:{NAME}"), (clip, "RN50")):
            save({"state_dict": {"layer.weight": Attack(ran)}}, path)
            assert str(path) in refused(load_vision, name, str(path)) and not ran.exists()
    for content in (b"", b"damaged", (timm_folder / "model.safetensors").read_bytes()[:999]):
        file.write_bytes(content)
        clip.write_bytes(content)
        assert str(file) in refused(load_vision, f"timm:{NAME}@{file}") and str(clip) in refused(
            load_vision, "RN50", str(clip)
        )
    torch.save({"layer.weight": torch.zeros(3)}, file)
    assert f"{file}: of another model" in refused(load_vision, f"timm:{NAME}@{file}")
    assert f"{file} holds the weights of another model" in refused(load_vision, "RN50", str(file))
    torch.save({"epoch": 3}, file)
    assert "hold no tensors by name" in refused(load_vision, f"timm:{NAME}@{file}")
    torch.save({**whole.state_dict(), "conv_stem.weight": torch.zeros(1)}, file)
    assert "of another model" in refused(load_vision, f"timm:{NAME}@{file}")
    folder = shutil.copytree(timm_folder, tmp_path / "folder")
    save_file({"layer.weight": torch.zeros(3)}, folder / "model.safetensors")
    assert "its weights: of another model, missing or damaged" in refused(load_vision, f"timm:local-dir:{folder}")
    (folder / "model.safetensors").unlink()
    assert "of another model, missing or damaged" in refused(load_vision, f"timm:local-dir:{folder}")
    assert "no folder with a config.json of timm" in refused(check_vision, f"timm:local-dir:{tmp_path}")
    assert "unknown to timm" in refused(check_vision, "timm:nonesuch") and "no weights at" in refused(
        check_vision, f"timm:{NAME}@x"
    )


@torch.no_grad()
def test_weights_of_open_clip_are_a_torch_file_or_safetensors(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32},
    }
    config["text_cfg"] = {"layers": 1, "width": 32, "heads": 2, "vocab_size": 49408}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny"])
    clip, pixels = open_clip.create_model("tiny", load_weights=False).eval(), torch.randn(2, 3, 32, 32)
    torch.save(clip.state_dict(), tmp_path / "w.pt")
    save_file(clip.state_dict(), tmp_path / "w.safetensors")
    found = [load_vision("tiny", str(tmp_path / name)) for name in ("w.pt", "w.safetensors")]
    for tower in found:
        want = F.normalize(clip.encode_image(pixels), dim=-1)
        torch.testing.assert_close(tower.text_tower().embed_features(tower(pixels)), want, atol=1e-5, rtol=1e-4)
