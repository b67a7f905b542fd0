"""Vision towers of transformers, as `hf:FOLDER` or `hf:ORG/NAME`: pooled, at their patches, and CLIP's and SigLIP's text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from fromage.errors import UserError, first_line
from fromage.models.frozen import hold
from fromage.models.vision.base import TextTower, VisionTower
from fromage.models.vision.hf_loading import folder_of, load_whole, read_config, vision_part
from fromage.models.vision.hf_preprocessing import preprocessing

PAIRS = ("clip", "siglip")  # architectures with a text tower; SigLIP 2 of a fixed resolution calls itself siglip
VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")
Source = tuple[str, str, bool]  # name, dtype, random_weights


class HfTower(VisionTower):
    """A frozen image model of transformers, pooled: v(x) in R^m is what the library calls pooler_output.

    CLIP: the class token after the final layer norm, before the projection, as OpenClipTower's. SigLIP: attention pooling.
    DINOv2, DINOv3: the class token after the final layer norm. ConvNeXt, ConvNeXt V2: the mean over places, layer-normed.
    ResNet, BiT, RegNet: the mean over places. ViT, DeiT: the pooler where the checkpoint holds one (those trained as
    classifiers have none); without one, as in their classifiers, the class token after the final layer norm. A SigLIP
    without its pooling head, and others without a class token: the mean over places.
    """

    def __init__(self, visual: Any, transform: Any, name: str, size: Sequence[int], source: Source) -> None:
        """source: arguments of load_whole that load this model with its text tower."""
        self.source = source
        try:
            super().__init__(visual, transform, name, size)
        except (UserError, IndexError):
            raise
        except Exception as error:
            told = f"gives no features of images of {size[0]} x {size[1]} pixels ({first_line(error)})"
            raise UserError(f"vision tower {name}: {told}; is its preprocessor_config.json its own?") from error

    @classmethod
    def load(cls, name: str, weights: str | None, dtype: str, random_weights: bool) -> HfTower:
        """See load_whole. weights: None, since the name includes them."""
        cls.check(name, weights)
        visual = vision_part(name, whole := load_whole(name, dtype, random_weights))
        transform, size = preprocessing(name, visual)
        tower = cls(visual, transform, name, size, (name, dtype, random_weights))
        if whole.config.model_type in PAIRS:
            hold(tower, "projection", _projection(whole))
        return tower

    @classmethod
    def load_patches(cls, name: str, weights: str | None, layer: int, dtype: str, random_weights: bool) -> HfPatches:
        """See HfPatches."""
        cls.check(name, weights)
        visual = vision_part(name, load_whole(name, dtype, random_weights))
        transform, size = preprocessing(name, visual, squash=True)
        return HfPatches(visual, transform, name, size, (name, dtype, random_weights), layer)

    @classmethod
    def check(cls, name: str, weights: str | None) -> None:
        """Raise UserError for weights beside the name, and for an architecture that is unknown or has no vision part."""
        if weights:
            raise UserError(f"vision tower {name}: its folder holds the weights; leave out vision_weights ({weights})")
        with torch.device("meta"):
            vision_part(name, load_whole(name, "float32", random_weights=True))

    def text_tower(self) -> HfText | None:
        """CLIP's or SigLIP's own text tower; it is loaded by this call. None for others, and for a vision tower alone."""
        if read_config(self.source[0]).model_type not in PAIRS:
            return None
        text: Any = HfText(*self.source)
        text.to(next(self.visual.parameters()).device)
        return text

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, m)."""
        out = self.visual(pixel_values=pixels)
        pooled = out.get("pooler_output")
        if pooled is None:
            states = out.last_hidden_state  # (B, T, m), or (B, m, rows, columns)
            first = states.ndim == 3 and self.places(states)[1] > 0  # a class token
            pooled = states[:, 0] if first else states.mean((2, 3) if states.ndim == 4 else 1)
        return pooled.flatten(1)  # ResNets say (B, m, 1, 1)

    def places(self, states: Tensor) -> tuple[tuple[int, int], int]:
        """(rows, columns) of patches of states (B, T, m), and how many class and register tokens are in front of them."""
        patch = getattr(self.visual.config, "patch_size", None) or 1
        height, width = (patch, patch) if isinstance(patch, int) else patch
        grid = self.image_size[0] // height, self.image_size[1] // width
        return grid, states.shape[1] - grid[0] * grid[1]


class HfPatches(HfTower):
    """A frozen image model of transformers read at its patches, (P, m) per image, without class and register tokens.

    Of a convolutional one, a feature map. The whole image is pressed into the tower's square; each patch is normalised.
    """

    def __init__(
        self, visual: Any, transform: Any, name: str, size: Sequence[int], source: Source, layer: int
    ) -> None:  # fmt: skip
        """layer: which layer of the tower (of a ConvNeXt, which stage) is read; -1 is the last."""
        self.layer = layer
        super().__init__(visual, transform, f"{name}, patches of {layer}", size, source)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, m, rows, columns)."""
        states = self.visual(pixel_values=pixels, output_hidden_states=True).hidden_states or ()
        found = states[1:][self.layer]  # the first is in front of the layers
        if found.ndim == 3:
            grid, others = self.places(found)
            if others < 0:
                raise UserError(f"vision tower {self.source[0]}: has no grid of patches; choose a ViT or a ConvNeXt")
            found = found[:, others:].transpose(1, 2).unflatten(2, grid)  # (B, T, m) -> (B, m, rows, columns)
        return found

    def text_tower(self) -> None:
        """None: a text tower goes with pooled features."""


class HfText(TextTower, nn.Module):
    """The text tower of a CLIP or SigLIP of transformers, and its projection of the features that HfTower gives."""

    def __init__(self, name: str, dtype: str = "float32", random_weights: bool = False) -> None:
        """Arguments and errors of load_whole. Raises UserError also for a folder without a tokenizer."""
        super().__init__()
        self.clip = load_whole(name, dtype, random_weights)
        self.project = _projection(self.clip)
        self.length = self.clip.config.text_config.max_position_embeddings
        del self.clip.vision_model  # HfTower holds it
        where = Path(folder_of(name))
        try:
            if where.is_dir() and not any((where / file).exists() for file in VOCABULARIES):
                raise FileNotFoundError("no vocabulary")  # transformers would make an empty one
            self.tokenize = AutoTokenizer.from_pretrained(str(where), trust_remote_code=False)
        except Exception as error:
            told = "no tokenizer of its text tower; add its files, or leave CLIP out: --no-clip"
            raise UserError(f"vision tower {name}: {told}") from error

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, e) unit rows; filled up and cut to the text tower's length, as it was trained."""
        form: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": self.length}
        ids = self.tokenize(list(texts), return_tensors="pt", **form)["input_ids"]  # (N, T); causal, or trained unmasked
        found = self.clip.get_text_features(input_ids=ids.to(self.clip.logit_scale.device))
        return F.normalize(getattr(found, "pooler_output", found).float(), dim=-1)  # (N, e)


def _projection(pair: Any) -> nn.Module:
    """(N, m) -> (N, e): what a CLIP has after its vision tower; SigLIP has nothing there."""
    return getattr(pair, "visual_projection", nn.Identity()).float().requires_grad_(False)
