"""The two frozen towers: any Hugging Face causal LM and any open_clip vision tower.

Contract: a tower is in eval mode whatever is asked of it, none of its parameters wants a gradient, and it holds the dtype
it was loaded in. 'toy' names the pair that ships with the package; it is loaded by the same code as any other.
"""

from __future__ import annotations

import hashlib
import logging
import re
import socket
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse
from urllib.request import getproxies

import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_bitsandbytes_available
from transformers.utils.logging import disable_progress_bar

from fromage.added_tokens import AddedTokens, ExtendedEmbedding, ExtendedHead
from fromage.errors import UserError, first_line
from fromage.image_transform import Decoding, decoding_as, halves
from fromage.packed_attention import Attend, attending
from fromage.tokens import IMAGE, RET, PromptTokenizer

TOY = Path(__file__).parent / "toy" / "backbones"
Quantized = Literal["int8", "nf4"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FrozenTower(nn.Module):
    """A module that nothing can set to training mode."""

    def freeze(self) -> None:
        """Stop gradients to every parameter and switch dropout off for good."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenTower:
        """Stays in eval mode."""
        return super().train(False)


class LanguageModel(FrozenTower):
    """A frozen causal LM that knows the tokens added to it, as [RET].

    Attributes:
        hf: the Hugging Face model; its embedding and head are extended by the added rows, so `hf.generate` works.
        width: d of the input embeddings, which is also that of the hidden states before the head.
        added: the trained rows. They belong to the model around this tower (see fromage.model).
    """

    def __init__(self, hf: Any, tokenizer: PromptTokenizer, name: str) -> None:
        super().__init__()
        embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
        if embedding.weight.shape[0] < tokenizer.vocab_size:
            rows = embedding.weight.shape[0]
            raise UserError(
                f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {rows} rows; load a fitting pair"
            )
        self.hf, self.tokenizer, self.name = hf, tokenizer, name
        self.width: int = embedding.weight.shape[1]
        self.freeze()
        tied = head.weight is embedding.weight
        added = AddedTokens(embedding, head, tokenizer.row_ids, tokenizer.vocab_size, tied)
        self._added = (added,)
        hf.set_input_embeddings(ExtendedEmbedding(embedding, added))
        hf.set_output_embeddings(ExtendedHead(head, added))

    @property
    def added(self) -> AddedTokens:
        """The trained rows beside the frozen vocabulary."""
        return self._added[0]

    @property
    def dtype(self) -> torch.dtype:
        """What the frozen weights are held in; of a quantised tower, what it computes in."""
        return self.hf.get_input_embeddings().weight.dtype

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer layers: what is compiled, recomputed or sharded one by one."""
        return [module for module in self.hf.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, d) input embeddings."""
        return self.hf.get_input_embeddings()(ids)

    def forward(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """(B, T, d) input embeddings and (B, T) bool mask -> (B, T, d) hidden states after the last layer norm.

        Positions count the tokens that are not masked, so padding anywhere changes nothing.
        """
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)  # (B, T)
        output = self.hf.base_model(
            inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions, use_cache=False
        )
        return output.last_hidden_state

    def cached(self, embeds: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """(B, T, d) input embeddings at positions (B, T) behind what the cache holds -> (B, T, d) hidden states.

        mask: (B, 1, T, S + T) bool, which of the S tokens in the cache and the T new ones each of these sees.
        """
        output = self.hf.base_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return output.last_hidden_state

    def packed(self, embeds: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """(1, N, d) packed input embeddings at positions (N,) -> (N, d) hidden states; attend says who sees whom."""
        with attending(self.hf.config, attend):
            output = self.hf.base_model(inputs_embeds=embeds, position_ids=positions.unsqueeze(0), use_cache=False)
        return output.last_hidden_state[0]

    @property
    def head(self) -> nn.Linear:
        """The frozen output head, without the added rows."""
        return self.hf.get_output_embeddings().frozen

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) hidden states -> (..., V + 2) logits in float32; the column of <|image|> is -inf."""
        return self.capped(self.hf.get_output_embeddings()(hidden).float())

    @property
    def cap(self) -> float | None:
        """What tanh keeps logits within (Gemma 2), or None."""
        return getattr(self.hf.config, "final_logit_softcapping", None)

    def capped(self, logits: Tensor) -> Tensor:
        """The head's products -> logits."""
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class VisionTower(FrozenTower):
    """A frozen open_clip image tower, pooled before CLIP's projection: v(x) in R^m.

    For the ViTs of CLIP this is the class token after the final layer norm, what Hugging Face calls pooler_output.

    Attributes:
        transform: PIL image -> (3, H, W) uint8, the tower's own resize and crop; normalisation is part of the forward.
        shape: of the features of one picture, (m,).
        width: m.
    """

    def __init__(self, clip: Any, transform: Any, name: str) -> None:
        super().__init__()
        self.visual, self.name = _without_projection(clip.visual), name
        self.transform, self.normalise = halves(transform)
        self.freeze()
        size = clip.visual.image_size
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        parameter = next(self.visual.parameters())
        with torch.no_grad():
            probe = torch.zeros(1, 3, *self.image_size, dtype=parameter.dtype, device=parameter.device)
            self.shape = self.encode(probe).shape[1:]
        self.width: int = self.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """What the frozen weights are held in."""
        return next(self.visual.parameters()).dtype

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels, uint8 or normalised -> (B, *shape) features, without gradient."""
        parameter = next(self.visual.parameters())
        pixels = pixels.to(parameter.device, non_blocking=True)
        if pixels.dtype == torch.uint8 and self.normalise:
            pixels = self.normalise(pixels)
        return self.encode(pixels.to(parameter.dtype)).contiguous()  # a ViT gives a view that would keep all tokens alive

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, m): what the tower is read for."""
        return self.visual(pixels)

    def fingerprint(self, decoding: Decoding = "draft") -> dict[str, str]:
        """What stored features depend on: the tower's name, its weights (a digest of samples) and the preprocessing."""
        shown = re.sub(r" at 0x[0-9a-f]+|\s+", " ", str(decoding_as(self.transform, decoding)))
        return {"tower": self.name, "weights": digest_of_samples(self.visual), "preprocessing": shown}


def digest_of_samples(module: nn.Module) -> str:
    """16 hex digits of some numbers of every tensor of a module, the same whatever dtype it is loaded in."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        flat = value.flatten()
        digest.update(name.encode())
        digest.update(flat[:: max(1, flat.numel() // 64)].bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class PatchTower(VisionTower):
    """A frozen open_clip image tower read at its patches, (P, m) a picture, before its last layer as LLaVA reads it.

    It sees the whole picture, pressed into its square, so that a place is the same share of either. Each patch comes at mean
    0 and variance 1, whatever the layer's scale.

    Attributes:
        grid: rows and columns of patches, P in all.
    """

    def __init__(self, clip: Any, name: str, layer: int = -2) -> None:
        """layer: which of the tower's layers (of a ResNet, its stages) is read; -1 is the last."""
        self.layer = layer
        squash = open_clip.transform.merge_preprocess_dict(
            open_clip.get_model_preprocess_cfg(clip), {"resize_mode": "squash"}
        )
        config = open_clip.transform.PreprocessCfg(**squash)
        super().__init__(clip, open_clip.transform.image_transform_v2(config, is_train=False), f"{name}, patches of {layer}")

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, P, m)."""
        layers = {"indices": [self.layer], "stop_early": True, "intermediates_only": True}
        found = self.visual.forward_intermediates(pixels, **layers)["image_intermediates"][0]  # (B, m, rows, columns)
        self.grid = tuple(found.shape[2:])
        patches = found.flatten(2).transpose(1, 2)  # (B, P, m)
        return F.layer_norm(patches.float(), patches.shape[-1:]).to(pixels.dtype)


def _without_projection(visual: Any) -> Any:
    """Take CLIP's projection off an open_clip image tower: a ViT, a ResNet with attention pooling, or one of timm's."""
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
    """The head of one of timm's towers in open_clip (SigLIP, ConvNeXt ...): its pooling, and what is behind it."""
    parts = dict(visual.head.named_children())
    pooling = [parts.pop("pool")] if "pool" in parts else []  # most pool in their trunk
    return nn.Sequential(*pooling), nn.Sequential(*parts.values())


@cache
def look_for_hub() -> None:
    """Without a way to the model hub, look at its cache only: the hub's own retries take minutes to fail."""
    if constants.HF_HUB_OFFLINE or getproxies():
        return
    try:
        socket.create_connection((urlparse(constants.ENDPOINT).hostname or "", 443), timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


def load_tokenizer(name: str) -> PromptTokenizer:
    """The tokenizer of a language model, by hub name or folder. Raises UserError where there is none within reach."""
    return PromptTokenizer(_folder(name))


def _folder(name: str) -> str:
    """Where a language model lies: its name on the hub, or a folder."""
    folder = str(TOY / "opt") if name == "toy" else name
    if not Path(folder).exists():
        look_for_hub()
    return folder


def load_lm(
    name: str,
    dtype: str = "float32",
    random_weights: bool = False,
    quantize: Quantized | None = None,
    rows: Sequence[str] = (RET,),
    places: Sequence[str] = (IMAGE,),
) -> LanguageModel:
    """Load and freeze a causal LM by hub name or folder ('toy': the one in the package). rows, places: see PromptTokenizer.

    random_weights builds the architecture from its configuration alone, for tests and speed measurements. quantize holds the
    linear layers, but for the head, in int8 (LLM.int8) or in 4 bits (NF4, QLoRA), by bitsandbytes; they compute in dtype.
    Raises UserError for an unknown name and for weights that are neither on disk nor reachable.
    """
    if quantize and random_weights:
        raise UserError("quantize needs weights to quantise: leave out random_weights, or quantize")
    options = {"dtype": DTYPES[dtype]} | ({"quantization_config": _quantization(quantize, dtype)} if quantize else {})
    if name == "toy":
        disable_progress_bar()  # of its weights, which are there at once
    folder = _folder(name)
    tokenizer = PromptTokenizer(folder, rows, places)
    try:
        if random_weights:
            hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=DTYPES[dtype])
        else:
            hf = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:
        raise UserError(
            f"language model {name}: no weights on disk or within reach ({first_line(error)}); "
            "give a folder, or fetch it where there is a network: hf download " + name
        ) from error
    for module in hf.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # where bitsandbytes repacks 4-bit weights, gradients do not pass
            module.support_avx512bf16_for_cpu = False
    return LanguageModel(hf, tokenizer, name)


def _quantization(kind: Quantized, dtype: str) -> BitsAndBytesConfig:
    if not is_bitsandbytes_available():
        raise UserError(f"quantize {kind} needs bitsandbytes: pip install 'fromage[quant]'")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPES[dtype]
    )


def clip_weights(name: str, pretrained: str | None) -> str | None:
    """Which weights load_clip takes: those that are given, or None where the name brings its own.

    Raises UserError for a name that open_clip does not know, and for one whose weights are missing.
    """
    if name == "toy" or ":" in name:
        return None
    if name not in open_clip.list_models():
        raise UserError(
            f"vision tower {name}: unknown to open_clip; open_clip.list_models() names {len(open_clip.list_models())}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not pretrained or not (pretrained in tags or Path(pretrained).exists()):
        wrong = f"no weights called {pretrained}" if pretrained else "comes without weights, name them as vision_weights"
        raise UserError(f"vision tower {name}: {wrong}; there are: {', '.join(tags) or 'none'}, or a file")
    return pretrained


def load_clip(
    name: str, pretrained: str | None = None, dtype: str = "float32", random_weights: bool = False
) -> tuple[Any, Any, Any]:
    """An open_clip model whole, in eval mode: (model, image transform, text tokenizer).

    name: a model of open_clip ('ViT-L-14'), 'local-dir:FOLDER', 'hf-hub:ORG/NAME', or 'toy'. pretrained: open_clip's tag
    or a file, which only a model of open_clip needs; random_weights leaves that one without. Raises UserError as load_lm.
    """
    pretrained = None if random_weights else clip_weights(name, pretrained)
    source = f"local-dir:{TOY / 'clip'}" if name == "toy" else name
    precision = {"float32": "fp32", "bfloat16": "pure_bf16", "float16": "pure_fp16"}[dtype]
    if not source.startswith("local-dir:") and (pretrained or ":" in source) and not Path(pretrained or "").is_file():
        look_for_hub()
    silent = logging.root.manager.disable
    logging.disable(logging.ERROR)  # open_clip logs what the error below says, and that random weights are random
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            source, pretrained=pretrained, precision=precision, force_quick_gelu=_wants_quick_gelu(source, pretrained)
        )
        tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:
        raise UserError(
            f"vision tower {name} ({pretrained}): no weights on disk or within reach ({first_line(error)}); "
            "give a file as vision_weights, or fetch them once where there is a network"
        ) from error
    finally:
        logging.disable(silent)
    return model.eval().requires_grad_(False), transform, tokenizer


def _wants_quick_gelu(name: str, pretrained: str | None) -> bool:
    """Whether weights were trained with x sigmoid(1.702 x), as OpenAI's were; open_clip would but warn."""
    return bool((open_clip.get_pretrained_cfg(name, pretrained) or {}).get("quick_gelu")) if pretrained else False


def load_vision(
    name: str, pretrained: str | None = None, dtype: str = "float32", random_weights: bool = False
) -> VisionTower:
    """Load and freeze the image tower of an open_clip model; see load_clip."""
    clip, transform, _ = load_clip(name, pretrained, dtype, random_weights)
    return VisionTower(clip, transform, _full_name(name, pretrained, random_weights))


def load_patches(
    name: str, pretrained: str | None = None, layer: int = -2, dtype: str = "float32", random_weights: bool = False
) -> PatchTower:
    """Likewise, to be read at the patches of a layer; see PatchTower. Raises UserError for a layer that is not there."""
    clip, _, _ = load_clip(name, pretrained, dtype, random_weights)
    try:
        return PatchTower(clip, _full_name(name, pretrained, random_weights), layer)
    except (AssertionError, IndexError) as error:
        raise UserError(f"vision tower {name}: has no layer {layer}; -1 is its last") from error


def _full_name(name: str, pretrained: str | None, random_weights: bool) -> str:
    weights = None if random_weights else clip_weights(name, pretrained)
    return f"{name}/{weights}" if weights else name
