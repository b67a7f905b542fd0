"""Octopuses of other families, random and tiny, without a vision tower; and checkpoints of the toy towers, untrained."""

import torch
import transformers as hf

from fromage.config import OctopusConfig
from fromage.data.tokenizer import IMAGE_TOKEN, PromptTokenizer
from fromage.models.frozen import TOY
from fromage.models.language_model import LanguageModel
from fromage.octopus.model import Octopus
from fromage.octopus.module import OctopusModule
from fromage.octopus.queries import QUERY, index_token_names

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 128, "initializer_range": 0.3}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "opt": (hf.OPTConfig, SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "llama": (hf.LlamaConfig, GROUPED),
    "llama, tied": (hf.LlamaConfig, GROUPED | {"tie_word_embeddings": True}),
    "mistral": (hf.MistralConfig, GROUPED),
    "qwen2": (hf.Qwen2Config, GROUPED),
    "pythia": (hf.GPTNeoXConfig, SIZES),
    "gemma2, eager": (hf.Gemma2Config, GROUPED),
}


OWN = {  # an attention of their own
    "falcon": (hf.FalconConfig, SIZES | {"alibi": False}),
    "bloom": (hf.BloomConfig, {"hidden_size": 32, "n_layer": 4, "n_head": 4}),
}


class NoTower(torch.nn.Module):
    """Whoever has patches needs no tower."""

    shape, width, grid, name = (4, 20), 20, (2, 2), "none"


def build(family="opt", num_queries=3, **options):
    torch.manual_seed(0)
    tokenizer = PromptTokenizer(str(TOY / "opt"), index_token_names(num_queries), (IMAGE_TOKEN, QUERY))
    kind, sizes = family if isinstance(family, tuple) else FAMILIES[family]
    config = kind(vocab_size=tokenizer.vocab_size + 7, pad_token_id=1, bos_token_id=2, eos_token_id=2, **sizes)
    lm = LanguageModel(hf.AutoModelForCausalLM.from_config(config), tokenizer, str(family))
    sizes = {"decoder_width": 16, "decoder_layers": 2, "heads": 2} | options
    return Octopus(lm, NoTower(), OctopusConfig(num_queries=num_queries, **sizes))


def save_untrained(path, num_queries=4, mask_scale=0):
    """Write a checkpoint as a run on the toy towers would at its beginning; no queries: the sequential counterpart."""
    towers = {"lm": "toy", "vision": "toy", "vision_weights": None, "dtype": "float32"}
    sizes = {"num_queries": num_queries, "decoder_width": 16, "decoder_layers": 1, "heads": 2, "mask_scale": mask_scale}
    module = OctopusModule(stage=3, **sizes, **towers)
    module.configure_model()
    trained = {f"model.{name}": p.detach() for name, p in module.model.trained().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": trained, "hyper_parameters": dict(module.hparams)}, path)
    return path
