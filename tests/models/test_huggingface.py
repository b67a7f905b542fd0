"""Towers of transformers, random and tiny in the library's own layout, against its own output and open_clip's."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from fromage.checkpoints import hub
from fromage.errors import UserError
from fromage.models.vision.huggingface import HfText, HfTower
from fromage.models.vision.open_clip import OpenClipPatches, OpenClipTower
from fromage.models.vision.registry import check_vision, load_patches, load_vision, plan_vision

FAMILIES = ("clip", "siglip", "dinov2", "dinov3", "vit", "vit classifier", "convnext", "convnextv2")
VITS = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov3": 5, "vit": 1}  # class and register tokens


def photographs():
    """Noise with edges and slopes, larger and smaller than the towers' input, of odd shapes."""
    rng = np.random.default_rng(0)
    sizes = ((291, 183), (150, 415), (33, 33), (20, 15))
    return [Image.fromarray(rng.integers(0, 256, (h // 3, w // 3, 3), dtype=np.uint8)).resize((w, h)) for w, h in sizes]


def processed(folder, images):
    return AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]


@pytest.fixture
def folder(hf_folders, tmp_path):
    """A copy of the ViT, to be spoiled."""
    return shutil.copytree(hf_folders["vit"], tmp_path / "vit")


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_features_are_the_librarys(hf_folders, family):
    tower, pixels = load_vision(f"hf:{hf_folders[family]}"), processed(hf_folders[family], photographs())
    if family == "vit classifier":
        whole = transformers.ViTForImageClassification.from_pretrained(hf_folders[family]).eval()
        torch.testing.assert_close(whole.classifier(tower(pixels)), whole(pixels).logits)
    else:
        whole = AutoModel.from_pretrained(hf_folders[family]).eval()
        want = getattr(whole, "vision_model", whole)(pixel_values=pixels).pooler_output
        torch.testing.assert_close(tower(pixels), want)
    assert tower.shape == (tower.width,) and not any(p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_transform_is_the_image_processor_to_a_level(hf_folders, family):
    tower = load_vision(f"hf:{hf_folders[family]}")
    level = 255 * torch.tensor(tower.normalise.std).view(3, 1, 1)
    for image in photographs():
        pixels, (want,) = tower.transform(image), processed(hf_folders[family], [image])
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, *tower.image_size)
        off = ((tower.normalise(pixels[None])[0] - want) * level).abs()
        exact = family not in ("dinov3", "convnextv2")  # one resizes floats, the other enlarges by a rounded factor
        assert off.max() < (0.01 if exact else 2.01) and off.mean() < 0.5


def test_a_processor_with_settings_of_its_own_and_one_that_does_more(folder):
    file = folder / "preprocessor_config.json"
    given = json.loads(file.read_text())
    for more in ({"rescale_factor": 1 / 127.5}, {"do_normalize": False}, {"do_rescale": False, "image_std": [99.0] * 3}):
        file.write_text(json.dumps(given | more))
        tower, image = load_vision(f"hf:{folder}"), photographs()[0]
        want = processed(folder, [image])
        torch.testing.assert_close(tower.normalise(tower.transform(image)[None]), want, atol=1e-4, rtol=1e-4)
    file.write_text(json.dumps(given | {"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True}))
    tower = load_vision(f"hf:{folder}")
    assert tower.normalise is None and torch.equal(tower.transform(image), processed(folder, [image])[0])
    assert "EfficientNet" in tower.fingerprint()["preprocessing"]
    with pytest.raises(UserError, match="does more than scaling and normalising"):
        load_patches(f"hf:{folder}")


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("family", [*VITS, "convnext"])
def test_patches_are_the_librarys_hidden_states(hf_folders, family, layer):
    tower = load_patches(f"hf:{hf_folders[family]}", layer=layer)
    pixels = torch.randn(2, 3, *tower.image_size)
    whole = AutoModel.from_pretrained(hf_folders[family]).eval()
    states = getattr(whole, "vision_model", whole)(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
    rows = states.flatten(2).transpose(1, 2) if states.ndim == 4 else states[:, VITS[family] :]  # (B, P, m)
    torch.testing.assert_close(tower(pixels), F.layer_norm(rows, rows.shape[-1:]))
    assert tower.grid[0] * tower.grid[1] == tower.shape[0] and tower.text_tower() is None
    halved = Image.new("RGB", (600, 40))
    halved.paste("white", (300, 0, 600, 40))
    shown = tower.transform(halved)  # pressed, not cut: each half has its half
    middle = tower.image_size[1] // 2
    assert shown[:, :, : middle - 2].max() < 20 and shown[:, :, middle + 2 :].min() > 235


@torch.no_grad()
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_text_tower_is_the_librarys(hf_folders, family):
    tower = load_vision(f"hf:{hf_folders[family]}")
    text, pixels = tower.text_tower(), processed(hf_folders[family], photographs())
    whole = AutoModel.from_pretrained(hf_folders[family]).eval()
    texts = ["a red circle", "blue " * 40]
    ids = text.tokenize(texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
    said = whole(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(text.embed_features(tower(pixels)), said.image_embeds)
    torch.testing.assert_close(text.embed_text(texts), said.text_embeds)
    assert isinstance(text, HfText) and load_vision(f"hf:{hf_folders['vit']}").text_tower() is None


def as_hf(state, layers):
    """Tensors of an open_clip ViT by transformers' names for a CLIP's vision tower."""
    said = {
        "embeddings.class_embedding": state["class_embedding"],
        "embeddings.patch_embedding.weight": state["conv1.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
    }
    pairs = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    for i in range(layers):
        ours, theirs = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            for part, rows in zip("qkv", state[f"{ours}attn.in_proj_{kind}"].chunk(3), strict=True):
                said[f"{theirs}self_attn.{part}_proj.{kind}"] = rows
        pairs |= {f"{ours}ln_1": f"{theirs}layer_norm1", f"{ours}ln_2": f"{theirs}layer_norm2"}
        pairs |= {f"{ours}attn.out_proj": f"{theirs}self_attn.out_proj"}
        pairs |= {f"{ours}mlp.c_fc": f"{theirs}mlp.fc1", f"{ours}mlp.c_proj": f"{theirs}mlp.fc2"}
    return said | {f"{b}.{kind}": state[f"{a}.{kind}"] for a, b in pairs.items() for kind in ("weight", "bias")}


def test_a_clip_is_the_same_by_both_libraries(hf_folders, tmp_path):
    torch.manual_seed(0)
    vision = {"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32, "mlp_ratio": 1.5}
    clip = open_clip.CLIP(24, vision, {"layers": 1, "width": 32, "heads": 2, "vocab_size": 100}, quick_gelu=True).eval()
    whole = AutoModel.from_pretrained(hf_folders["clip"])
    whole.vision_model.load_state_dict(as_hf(clip.visual.state_dict(), 3))
    whole.visual_projection.weight = torch.nn.Parameter(clip.visual.proj.detach().T.contiguous())
    shutil.copytree(hf_folders["clip"], tmp_path / "clip")
    whole.save_pretrained(tmp_path / "clip")
    name, pixels = f"hf:{tmp_path / 'clip'}", torch.randn(3, 3, 32, 32)
    tower = load_vision(name)
    with torch.no_grad():
        want = F.normalize(clip.encode_image(pixels), dim=-1)
    torch.testing.assert_close(tower.text_tower().embed_features(tower(pixels)), want, atol=1e-5, rtol=1e-4)
    clip.visual.preprocess_cfg = {"size": 32}
    for layer in (-1, -2, 0):
        mine = load_patches(name, layer=layer)(pixels)
        torch.testing.assert_close(mine, OpenClipPatches(clip, "clip", layer)(pixels), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tower(pixels), OpenClipTower(clip, None, "clip")(pixels), atol=1e-5, rtol=1e-4)


def test_dtype_random_weights_and_plans(hf_folders):
    name = f"hf:{hf_folders['dinov2']}"
    tower, other = load_vision(name, dtype="bfloat16"), load_vision(name, random_weights=True)
    assert tower(torch.zeros(1, 3, 32, 32)).dtype == torch.bfloat16 == tower.dtype
    assert other.fingerprint()["weights"] != tower.fingerprint()["weights"] == load_vision(name).fingerprint()["weights"]
    for family in FAMILIES:
        planned, patches = (plan_vision(f"hf:{hf_folders[family]}", layer=layer) for layer in (None, -1))
        assert planned.shape == load_vision(f"hf:{hf_folders[family]}").shape and next(planned.parameters()).is_meta
        assert len(patches.shape) == 2
    assert load_vision(name, "openai").width == tower.width  # the default of configurations is a tag of open_clip's


def spoil(folder, name, text):
    (folder / name).write_text(text) if text else (folder / name).unlink()
    return f"hf:{folder}"


PROCESS = '{"image_processor_type": "%sImageProcessor", "size": %s}'
CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (CONFIG, "", r"no folder with a config\.json of transformers"),
        (CONFIG, '{"model_type": "nonesuch"}', "knows no architecture 'nonesuch'"),
        (CONFIG, "{", r"its config\.json is damaged"),
        (CONFIG, '{"model_type": "opt"}', "of type opt has no vision tower of its own"),
        (CONFIG, '{"model_type": "vit", "hidden_size": 32, "num_attention_heads": 4}', "no weights that fit it"),
        (WEIGHTS, "", "no weights that fit it on disk"),
        (WEIGHTS, "damaged", "no weights that fit it on disk"),
        (PROCESSOR, "", r"no preprocessor_config\.json"),
        (PROCESSOR, PROCESS % ("ViT", '{"shortest_edge": 40}'), "no fixed size of images"),
        (PROCESSOR, PROCESS % ("Siglip2", "null"), "no fixed size of images"),
        (PROCESSOR, PROCESS % ("ViT", '{"height": 9, "width": 9}, "image_mean": [0, 0]'), "its image processor fails"),
        (PROCESSOR, PROCESS % ("ViT", '{"height": 9, "width": 9}'), "gives no features of images of 9 x 9"),
    ],
)  # fmt: skip
def test_a_spoiled_folder_is_one_line(folder, file, text, said):
    name = spoil(folder, file, text)
    with pytest.raises(UserError, match=said) as raised:
        load_vision(name)
    assert "\n" not in str(raised.value) and name in str(raised.value)


def test_missing_tensors_and_weights_beside_the_folder(folder):
    state = load_file(folder / WEIGHTS)
    del state["layernorm.weight"]
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=r"its weights lack .*layernorm\.weight \(1 in all\)"):
        load_vision(f"hf:{folder}")
    with pytest.raises(UserError, match="its folder holds the weights"):
        check_vision(f"hf:{folder}", str(folder / WEIGHTS))
    with pytest.raises(UserError, match="no layer -9; -1 is its last"):
        load_patches(f"hf:{folder}", layer=-9, random_weights=True)


def test_no_hub_no_grid_and_no_tokenizer(hf_folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "stay_offline_without_hub", lambda: None)
    with pytest.raises(UserError, match=r"neither a folder nor within reach on the hub.* hf download none/such"):
        load_vision("hf:none/such")
    with pytest.raises(UserError, match="swin: has no grid of patches"):
        load_patches(f"hf:{hf_folders['swin']}")
    shutil.copytree(hf_folders["clip"], tmp_path / "clip", ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(UserError, match=r"no tokenizer of its text tower.*--no-clip"):
        HfTower.load(f"hf:{tmp_path / 'clip'}", None, "float32", False).text_tower()
