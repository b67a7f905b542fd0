"""Vision towers of transformers, as `hf:FOLDER` or `hf:ORG/NAME`: pooled, at their patches, and CLIP's and SigLIP's text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.image_utils import SizeDict

from fromage.checkpoints.format import DTYPES
from fromage.checkpoints.hub import stay_offline_without_hub
from fromage.errors import UserError, first_line
from fromage.images.transforms import halves, scaling
from fromage.models.frozen import hold, require_weights
from fromage.models.vision.base import TextTower, VisionTower, quiet

PAIRS = ("clip", "siglip")  # architectures with a text tower; SigLIP 2 of a fixed resolution calls itself siglip
PROBES = ((97, 61), (61, 97), (83, 83))  # (width, height) of images on which a processor is tried
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
        """CLIP's or SigLIP's own text tower; it is loaded by this call. None for others, and for an image tower alone."""
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
    """(N, m) -> (N, e): what a CLIP has after its image tower; SigLIP has nothing there."""
    return getattr(pair, "visual_projection", nn.Identity()).float().requires_grad_(False)


def folder_of(name: str) -> str:
    """The folder or name on the hub of 'hf:...'. Raises UserError for a folder that holds no model of transformers."""
    where = name.removeprefix("hf:")
    if not Path(where).exists():
        stay_offline_without_hub()
    elif not (Path(where) / "config.json").is_file():
        raise UserError(f"vision tower {name}: no folder with a config.json of transformers; name another")
    return where


def read_config(name: str) -> Any:
    """The configuration of 'hf:...'. Raises UserError for one that is not there or that transformers does not know."""
    where = folder_of(name)
    try:
        with quiet():
            return AutoConfig.from_pretrained(where, trust_remote_code=False)
    except Exception as error:
        if not Path(where).exists():
            told = f"neither a folder nor within reach on the hub; where there is a network: hf download {where}"
            raise UserError(f"vision tower {name}: {told}") from error
        raise UserError(f"vision tower {name}: {_architecture(where)}; name another") from error


def _architecture(folder: str) -> str:
    try:
        kind = json.loads((Path(folder) / "config.json").read_bytes())["model_type"]
        return f"transformers knows no architecture {str(kind)[:40]!r}, or not these settings of it"
    except (ValueError, KeyError, TypeError):
        return "its config.json is damaged or is not of transformers"


def load_whole(name: str, dtype: str = "float32", random_weights: bool = False) -> Any:
    """The model of 'hf:...' that AutoModel loads, in eval mode, of CLIP and SigLIP with both towers.

    Raises UserError for an unknown architecture, and for weights that are missing, damaged, of another model, or neither on
    disk nor on the hub.
    """
    config = read_config(name)
    with quiet():
        try:
            if random_weights:
                return AutoModel.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False).eval()
            given: dict[str, Any] = {"config": config, "dtype": DTYPES[dtype], "output_loading_info": True}
            whole, found = AutoModel.from_pretrained(folder_of(name), trust_remote_code=False, **given)
        except Exception as error:
            told = f"no weights that fit it on disk or within reach ({first_line(error).rstrip(':')})"
            raise UserError(f"vision tower {name}: {told}; fetch it again, or name another") from error
    missing = found["missing_keys"]
    if missing and all(key.startswith("pooler.") for key in missing):
        whole.pooler = None  # trained as a classifier, which reads the class token
    else:
        require_weights(f"vision tower {name}", missing)
    return whole.eval()


def vision_part(name: str, whole: Any) -> Any:
    """The part of a model that reads images. Raises UserError for one without."""
    part = getattr(whole, "vision_model", whole)
    if not isinstance(part, nn.Module) or getattr(part, "main_input_name", None) != "pixel_values":
        kind = whole.config.model_type
        raise UserError(f"vision tower {name}: a model of type {kind} has no image tower of its own; name one that has")
    return part


def preprocessing(name: str, visual: Any, squash: bool = False) -> tuple[Any, tuple[int, int]]:
    """What an image processor does, as a transform in two halves, and (H, W) of its images.

    squash: press the whole image into that size. A processor that does more than scaling, cutting and normalising is used as
    it is. On the meta device the transform is None. Raises UserError for a folder without a processor, and for one whose
    images have no fixed size.
    """
    config, on_meta = visual.config, next(visual.parameters()).device.type == "meta"
    try:
        processor = AutoImageProcessor.from_pretrained(folder_of(name), trust_remote_code=False)
    except Exception as error:
        if on_meta and isinstance(getattr(config, "image_size", None), int):
            return None, (config.image_size, config.image_size)
        raise UserError(
            f"vision tower {name}: no preprocessor_config.json that transformers can use; add its own"
        ) from error
    exact, images = Exact(processor), [*(_probe(*size) for size in PROBES), *map(_plain, ("black", "white", "teal"))]
    try:
        wanted = [exact(image) for image in images]
    except Exception as error:
        raise UserError(f"vision tower {name}: its image processor fails ({first_line(error)}); name another") from error
    if any(pixels.ndim != 3 or pixels.shape != wanted[0].shape for pixels in wanted):
        raise UserError(f"vision tower {name}: its image processor has no fixed size of images; name a tower with one")
    size = wanted[0].shape[1], wanted[0].shape[2]
    if on_meta:
        return None, size
    first = len(PROBES) if squash else 0  # pressing changes nothing where an image has one colour
    ours = _as_scaling(processor, size, squash)
    if ours and _same(ours, images[first:], wanted[first:]):
        return ours, size
    if squash:
        raise UserError(f"vision tower {name}: its image processor does more than scaling and normalising; name another")
    return exact, size


def _same(transform: Any, images: Sequence[Image.Image], wanted: Sequence[Tensor]) -> bool:
    """Whether a transform gives these normalised pixels, (3, H, W) each, up to two levels of 255, for rounding."""
    ours, normalise = halves(transform)
    if normalise is None:
        return False
    level = 255 * torch.tensor(normalise.std).view(3, 1, 1)
    pairs = zip(images, wanted, strict=True)
    return all(((normalise(ours(image)[None])[0] - pixels) * level).abs().max() < 2.01 for image, pixels in pairs)


class Exact:
    """An image processor as it is: PIL image -> (3, H, W) normalised."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        """Of an image that is decoded."""
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    def __repr__(self) -> str:
        return " ".join(f"{type(self.processor).__name__} {self.processor.to_dict()}".split())


def _as_scaling(p: Any, size: tuple[int, int], squash: bool) -> Any:
    """The transform of a processor's settings, or None; (f x - mean) / std is (x / 255 - mean / c) / (std / c)."""
    try:
        c = 255 * p.rescale_factor if p.do_rescale else 255.0
        mean, std = (p.image_mean, p.image_std) if p.do_normalize else ([0.0] * 3, [1.0] * 3)
        values = [x / c for x in mean], [x / c for x in std]
        filter_ = Image.Resampling(p.resample).name.lower()
    except (AttributeError, TypeError, ValueError):
        return None
    asked = getattr(p, "size", None) or SizeDict()
    crop: Sequence[int] | None = size if getattr(p, "do_center_crop", None) else None
    scaled: int | Sequence[int] = asked.shortest_edge or (asked.height or size[0], asked.width or size[1])
    if isinstance(scaled, int) and (portion := getattr(p, "crop_pct", None)):
        # ConvNeXt's: below 384 pixels scaled larger and cut, else pressed into the square
        scaled, crop = (int(scaled / portion), size) if scaled < 384 else (size, None)
    return scaling(size, None, filter_, *values) if squash else scaling(scaled, crop, filter_, *values)


def _probe(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([3 * x, 5 * y, x + 2 * y], 2).astype(np.uint8))


def _plain(colour: str) -> Image.Image:
    return Image.new("RGB", (50, 50), colour)
