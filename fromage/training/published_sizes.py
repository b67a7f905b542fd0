"""Configurations of language models: from their folders or the hub, and of OPT and Vicuna as their papers give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig, OPTConfig

from fromage.errors import UserError
from fromage.models.frozen import TOY

# layers, width, heads: Zhang et al., "OPT: Open Pre-trained Transformer Language Models", 2022, table 1
OPT = {
    "125m": (12, 768, 12), "350m": (24, 1024, 16), "1.3b": (24, 2048, 32), "2.7b": (32, 2560, 32), "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40), "30b": (48, 7168, 56), "66b": (64, 9216, 72),
}  # fmt: skip
# layers, width, heads, inner width: Touvron et al., "LLaMA", 2023, table 2, from which Vicuna is trained
VICUNA = {"lmsys/vicuna-7b-v1.5": (32, 4096, 32, 11008), "lmsys/vicuna-13b-v1.5": (40, 5120, 40, 13824)}


def lm_config(name: str) -> Any:
    """The configuration of a causal LM: from a folder, from published sizes by name, or from the hub."""
    folder, size = TOY / "opt" if name == "toy" else Path(name), name.removeprefix("facebook/opt-")
    if not folder.is_dir() and size in OPT:
        layers, width, heads = OPT[size]
        odd: dict[str, Any] = {"do_layer_norm_before": False} if size == "350m" else {}
        return OPTConfig(
            num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, ffn_dim=4 * width,
            word_embed_proj_dim=512 if size == "350m" else width, **odd,
        )  # fmt: skip
    if not folder.is_dir() and name in VICUNA:
        layers, width, heads, inner = VICUNA[name]
        return LlamaConfig(num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=inner)
    try:
        return AutoConfig.from_pretrained(folder if folder.is_dir() else name, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"language model {name}: no configuration on disk or within reach; give a folder with its config.json, "
            f"or one of {', '.join(['facebook/opt-' + size for size in OPT] + [*VICUNA])}"
        ) from error
