"""Vision towers of open_clip (CLIP, SigLIP, ConvNeXt, ...), pooled or at their patches, and their text towers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fromage.checkpoints.hub import stay_offline_without_hub
from fromage.checkpoints.weights import read_weights
from fromage.errors import UserError, first_line
from fromage.models.frozen import TOY, hold
from fromage.models.vision.base import TextTower, VisionTower, quiet


class OpenClipTower(VisionTower):
    """A frozen open_clip vision tower, pooled before CLIP's projection: v(x) in R^m, as in the released code.

    For CLIP's ViTs this is the class token after the final layer norm, Hugging Face's pooler_output.
    """

    def __init__(self, clip: Any, transform: Any, name: str, source: tuple[Any, ...] | None = None) -> None:
        """source: arguments of load_clip that load this CLIP with its text tower; None if it has no name."""
        self.source, projection = source, _projection(clip.visual)
        super().__init__(_without_projection(clip.visual), transform, name, clip.visual.image_size)
        if projection is not None:
            hold(self, "projection", projection)

    @classmethod
    def load(cls, name: str, weights: str | None, dtype: str, random_weights: bool) -> OpenClipTower:
        """See load_clip."""
        source = name, weights, dtype, random_weights
        clip, transform, _ = load_clip(*source)
        return cls(clip, transform, _full_name(name, weights, random_weights), source)

    @classmethod
    def check(cls, name: str, weights: str | None) -> None:
        """See clip_weights."""
        clip_weights(name, weights)

    @classmethod
    def load_patches(cls, name: str, weights: str | None, layer: int, dtype: str, random_weights: bool) -> OpenClipPatches:
        """See OpenClipPatches."""
        clip, _, _ = load_clip(name, weights, dtype, random_weights)
        return OpenClipPatches(clip, _full_name(name, weights, random_weights), layer)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, m)."""
        return self.visual(pixels)

    def text_tower(self) -> OpenClipText | None:
        """CLIP's own text tower; it is loaded by this call."""
        if self.source is None:
            return None
        text: Any = OpenClipText(*self.source)
        text.to(next(self.visual.parameters()).device)
        return text


class OpenClipPatches(OpenClipTower):
    """A frozen open_clip vision tower read at its patches, (P, m) per image, by default before its last layer as in LLaVA.

    The whole image is resized to the tower's square without a crop, so that relative coordinates stay valid. Each patch is
    normalised to mean 0 and variance 1.
    """

    def __init__(self, clip: Any, name: str, layer: int = -2) -> None:
        """layer: which layer of the tower (of a ResNet, which stage) is read; -1 is the last."""
        self.layer = layer
        squash = open_clip.transform.merge_preprocess_dict(
            open_clip.get_model_preprocess_cfg(clip), {"resize_mode": "squash"}
        )
        config = open_clip.transform.PreprocessCfg(**squash)
        super().__init__(clip, open_clip.transform.image_transform_v2(config, is_train=False), f"{name}, patches of {layer}")

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, m, rows, columns)."""
        layers = {"indices": [self.layer], "stop_early": True, "intermediates_only": True}
        return self.visual.forward_intermediates(pixels, **layers)["image_intermediates"][0]


class OpenClipText(TextTower, nn.Module):
    """CLIP's text tower, and its projection of the features that OpenClipTower gives."""

    def __init__(self, name: str, weights: str | None = None, dtype: str = "float32", random_weights: bool = False) -> None:
        """Arguments and errors of load_clip. Raises UserError also for a CLIP whose images have no projection."""
        super().__init__()
        self.clip, _, self.tokenize = load_clip(name, weights, dtype, random_weights)
        project = _projection(self.clip.visual)
        if project is None:
            kind = type(self.clip.visual).__name__
            raise UserError(f"CLIP's {kind} has no projection after its pooling; leave it out by --no-clip")
        self.project = project
        del self.clip.visual  # OpenClipTower holds it

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, e) unit rows; texts are cut at the length of its context, 77 tokens of OpenAI's."""
        ids = self.tokenize(list(texts)).to(self.clip.logit_scale.device)  # (N, L)
        return F.normalize(self.clip.encode_text(ids).float(), dim=-1)  # (N, e)


def load_clip(
    name: str, pretrained: str | None = None, dtype: str = "float32", random_weights: bool = False
) -> tuple[Any, Any, Any]:
    """A complete open_clip model in eval mode: (model, image transform, text tokenizer).

    name: a model of open_clip ('ViT-L-14'), 'local-dir:FOLDER', 'hf-hub:ORG/NAME', or 'toy'. pretrained: open_clip's tag or
    a file (torch or safetensors), needed for a model of open_clip only, and ignored with random_weights. Where torch's
    default device is meta, no weights are read. Raises UserError for unknown names and for weights that are neither on disk
    nor on the hub, or are of another model.
    """
    _check_name(name)
    pretrained = None if random_weights else clip_weights(name, pretrained)
    device, file = torch.get_default_device(), pretrained and Path(pretrained).is_file()
    if file and f"{name}-quickgelu" in open_clip.list_models():
        told = f"vision tower {name}: a file does not say which activation it was trained with, so it has {name}'s, GELU"
        warnings.warn(f"{told}; for OpenAI's weights name {name}-quickgelu", stacklevel=2)
    source = f"local-dir:{TOY / 'clip'}" if name == "toy" else name
    precision = {"float32": "fp32", "bfloat16": "pure_bf16", "float16": "pure_fp16"}[dtype]
    if not source.startswith("local-dir:") and (pretrained or ":" in source) and not file:
        stay_offline_without_hub()
    try:
        with quiet():  # open_clip logs what the error below says, and warns of random weights
            model, _, transform = open_clip.create_model_and_transforms(
                source,
                pretrained=pretrained,
                load_weights=device.type != "meta",
                precision=precision,
                device=device,
                force_quick_gelu=_wants_quick_gelu(source, pretrained),
            )
            tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:
        if file:
            read_weights(str(pretrained))  # raises, if it is the file
            raise UserError(f"vision tower {name}: {pretrained} holds the weights of another model; name its own") from error
        raise UserError(
            f"vision tower {name} ({pretrained}): no weights on disk or within reach ({first_line(error)}); "
            "give a file as vision_weights, or fetch them once where there is a network"
        ) from error
    return model.eval().requires_grad_(False), transform, tokenizer


def clip_weights(name: str, pretrained: str | None) -> str | None:
    """The weights that load_clip loads: the given ones, or None where the name includes them.

    Raises UserError for a name that open_clip does not know, and for missing weights.
    """
    if _check_name(name):
        return None
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not pretrained or not (pretrained in tags or Path(pretrained).exists()):
        wrong = f"no weights called {pretrained}" if pretrained else "comes without weights, name them as vision_weights"
        raise UserError(f"vision tower {name}: {wrong}; there are: {', '.join(tags) or 'none'}, or a file")
    return pretrained


def _check_name(name: str) -> bool:
    """Whether a name includes the weights. Raises UserError for one that open_clip does not know."""
    if name == "toy" or ":" in name:
        return True
    if name not in open_clip.list_models():
        told = f"unknown to open_clip; open_clip.list_models() names {len(open_clip.list_models())}"
        raise UserError(f"vision tower {name}: {told}; towers of others are timm:NAME and hf:NAME")
    return False


def _wants_quick_gelu(name: str, pretrained: str | None) -> bool:
    """Whether the weights were trained with QuickGELU, x sigmoid(1.702 x), as OpenAI's were; open_clip only warns of it."""
    return bool((open_clip.get_pretrained_cfg(name, pretrained) or {}).get("quick_gelu")) if pretrained else False


def _full_name(name: str, pretrained: str | None, random_weights: bool) -> str:
    weights = None if random_weights else clip_weights(name, pretrained)
    return f"{name}/{weights}" if weights else name


def _without_projection(visual: Any) -> Any:
    """Remove CLIP's projection from an open_clip vision tower: a ViT, a ResNet with attention pooling, or one of timm's."""
    if getattr(visual, "proj", None) is not None:
        visual.proj = None
    elif hasattr(visual, "attnpool"):
        old = visual.attnpool.c_proj
        whole = nn.Linear(old.in_features, old.in_features, device=old.weight.device, dtype=old.weight.dtype)
        nn.init.eye_(whole.weight)
        nn.init.zeros_(whole.bias)
        visual.attnpool.c_proj = whole
    elif hasattr(visual, "trunk") and hasattr(visual, "head"):
        visual.head, _ = split_head(visual)
    return visual


def split_head(visual: Any) -> tuple[nn.Sequential, nn.Sequential]:
    """The head of a timm tower in open_clip (SigLIP, ConvNeXt ...): its pooling, and the layers after it."""
    parts = dict(visual.head.named_children())
    pooling = [parts.pop("pool")] if "pool" in parts else []  # most timm towers pool in their trunk
    return nn.Sequential(*pooling), nn.Sequential(*parts.values())


def _projection(visual: Any) -> nn.Module | None:
    """(N, m) -> (N, e): the layers of an open_clip vision tower after pooling, which _without_projection removes.

    None for a tower that has none of its own.
    """
    if getattr(visual, "proj", None) is not None:  # a ViT
        after_pooling: Any = nn.Linear(visual.proj.shape[0], visual.proj.shape[1], bias=False)
        after_pooling.weight = nn.Parameter(visual.proj.detach().T)  # (m, e) -> (e, m)
    elif hasattr(visual, "attnpool"):  # a ResNet
        after_pooling = visual.attnpool.c_proj
    else:
        after_pooling = split_head(visual)[1] if hasattr(visual, "trunk") else None
    return None if after_pooling is None else deepcopy(after_pooling).float().requires_grad_(False)
