"""The frozen language model: any causal LM of Hugging Face, with a few trained token rows (fromage.models.special_tokens).

'toy' names the LM that ships with the package; the same code loads it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_bitsandbytes_available
from transformers.utils.logging import disable_progress_bar

from fromage.checkpoints.format import DTYPES
from fromage.checkpoints.hub import stay_offline_without_hub
from fromage.config import Quantized
from fromage.data.tokenizer import IMAGE_TOKEN, RET_TOKEN, PromptTokenizer
from fromage.distribution import pip_install
from fromage.errors import UserError, first_line
from fromage.models import gguf, towers
from fromage.models.cpu_linear import cpu_linears
from fromage.models.frozen import TOY, FrozenTower, hold, require_weights
from fromage.models.packed_attention import PackedAttention, additive, attending, route
from fromage.models.packed_layout import distances
from fromage.models.special_tokens import AddedTokens, ExtendedEmbedding, ExtendedHead

log = logging.getLogger(__name__)
MULTIPLIES = {"hyperclovax"}  # families whose logits_scaling is a factor; Granite and others divide by it
ROUNDING = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}  # of logits, in their standard deviations


class LanguageModel(FrozenTower):
    """A frozen causal LM with added tokens, such as [RET].

    Attributes:
        hf: the Hugging Face model; its embedding and head are extended by the added rows, so `hf.generate` works. Of its
            generation config only the special tokens are kept: `generate` would take any other option from there in silence.
        width: d, of the input embeddings and of the hidden states before the head.
        added: the trained rows. They are parameters of the model that contains this tower (fromage.models.fromage).
    """

    added: AddedTokens

    def __init__(self, hf: Any, tokenizer: PromptTokenizer, name: str, quantized: Quantized | None = None) -> None:
        """quantized: number type that the layers are held in, where it is not that of the weights."""
        super().__init__()
        embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
        if embedding.weight.shape[0] < tokenizer.vocab_size:
            rows = embedding.weight.shape[0]
            raise UserError(
                f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {rows} rows; load a fitting pair"
            )
        self.hf, self.tokenizer, self.name, self.quantized = hf, tokenizer, name, quantized
        self.width: int = embedding.weight.shape[1]
        self.freeze()
        route(hf.config)
        hf.generation_config = special_tokens_of(hf.generation_config)
        self._routes = hasattr(sys.modules[type(hf.base_model).__module__], "ALL_ATTENTION_FUNCTIONS")
        tied = head.weight is embedding.weight
        followers = len(tokenizer.ret_ids[1:])
        added = AddedTokens(embedding, head, tokenizer.trained_ids, tokenizer.vocab_size, tied, followers)
        hold(self, "added", added)
        hf.set_input_embeddings(ExtendedEmbedding(embedding, added))
        hf.set_output_embeddings(ExtendedHead(head, added))

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the frozen weights; of a quantised tower, the dtype it computes in."""
        return self.hf.get_input_embeddings().weight.dtype

    @property
    def max_length(self) -> int | None:
        """Longest sequence that there are positions for, in tokens; None where there is no limit."""
        return getattr(self.hf.config.get_text_config(), "max_position_embeddings", None)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer layers, which are compiled, recomputed or sharded one by one; not a vision tower's."""
        decoder = self.hf.base_model.get_decoder()
        return [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, d) input embeddings."""
        return self.hf.get_input_embeddings()(ids)

    def forward(self, embeds: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, T, d) input embeddings and (B, T) bool mask -> (B, T, d) hidden states after the last layer norm.

        Padding anywhere changes nothing: positions count unmasked tokens only, and padding between tokens is moved after
        them, since sliding windows and ALiBi count places. positions: (B, T), where tokens share some; see `visible`.
        """
        order = (~mask).long().argsort(dim=1, stable=True)  # (B, T): tokens first
        seen = mask.gather(1, order)  # (B, T)
        if positions is not None:
            positions = positions.gather(1, order)  # (B, T)
            attention = self.visible(positions, seen)  # (B, 1, T, T)
        else:
            last = (mask.long().sum(1, keepdim=True) - 1).clamp(min=0)  # (B, 1)
            positions, attention = torch.arange(mask.shape[1], device=mask.device).minimum(last), seen.long()  # (B, T) each
        output = self._run(_moved(embeds, order), attention_mask=attention, position_ids=positions, use_cache=False)
        return _moved(output.last_hidden_state, order.argsort(dim=1))  # (B, T, d)

    def visible(self, positions: Tensor, mask: Tensor) -> Tensor:
        """Positions (B, T), of which tokens share some, and bool mask (B, T) -> (B, 1, T, T), the mask of attention.

        It is `additive`. As in packed_attention, a token sees itself and earlier positions. Raises UserError for a family
        that has positions of its own (ALiBi), and for rows beyond a sliding window, which counts places.
        """
        config, T = self.hf.config.get_text_config(), mask.shape[1]
        if not self._routes:
            told = f"{config.model_type} counts positions by itself, so [RET] cannot be stacked; choose sequential"
            raise UserError(f"{self.name}: {told}")
        window = getattr(config, "sliding_window", None)
        if window is not None and window < T:
            raise UserError(f"{T} tokens in a row: {self.name} looks back {window} in places; shorten the rows")
        seen = (distances(positions) >= 0) & mask.unsqueeze(1)  # (B, T, T)
        return additive(seen, self.dtype).unsqueeze(1)  # (B, 1, T, T)

    def packed(self, embeds: Tensor, positions: Tensor, attend: PackedAttention) -> Tensor:
        """(1, N, d) packed input embeddings at positions (N,) -> (N, d) hidden states; see packed_attention for attend.

        Raises UserError for a family with layers that have an attention of their own, or none: ALiBi, sinks, chunks, states.
        """
        if self._routes:
            whole = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)  # or transformers reads positions
            with attending(attend):
                output = self._run(embeds, attention_mask=whole, position_ids=positions.unsqueeze(0), use_cache=False)
        config = self.hf.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if not self._routes or kinds or len(attend.layers) < config.num_hidden_layers:
            raise UserError(
                f"{self.name}: {config.model_type} has an attention of its own, which cannot run packed sequences, as the "
                "fast step, scores and Octopus do; train FROMAGe with --model.step reference, or choose another language "
                "model"
            )
        return output.last_hidden_state[0]  # (1, N, d) -> (N, d)

    def _run(self, embeds: Tensor, **named: Any) -> Any:
        with cpu_linears():
            return self.hf.base_model(inputs_embeds=embeds, **named)

    @property
    def head(self) -> nn.Linear:
        """The frozen output head, without the added rows."""
        return self.hf.get_output_embeddings().frozen

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) hidden states -> (..., V + 1 + n) logits in float32; the column of <|image|> is -inf."""
        with cpu_linears():
            return self.capped(self.hf.get_output_embeddings()(hidden).float())  # (..., d) -> (..., V + 1 + n)

    def frozen_logits(self, hidden: Tensor) -> Tensor:
        """(N, d) hidden states -> (N, V) logits in float32, of the frozen vocabulary alone."""
        with cpu_linears():
            return self.capped(self.head(hidden)[:, : self.added.vocab_size].float())  # (N, d) -> (N, V)

    @property
    def cap(self) -> float | None:
        """The bound of the logits' soft cap by tanh (Gemma 2, RecurrentGemma), or None."""
        config = self.hf.config.get_text_config()
        return getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)

    @property
    def factor(self) -> float:
        """What the output of the head is multiplied by (Granite, Cohere, HyperCLOVA X); 1 elsewhere."""
        config = self.hf.config.get_text_config()
        scaling = float(getattr(config, "logits_scaling", None) or 1)
        return float(getattr(config, "logit_scale", None) or (scaling if config.model_type in MULTIPLIES else 1 / scaling))

    def capped(self, logits: Tensor) -> Tensor:
        """Output of the head -> logits, of the same shape, multiplied and capped as the model has it; -inf stays."""
        if self.factor != 1:
            logits = logits * self.factor
        if self.cap is None:
            return logits
        return (torch.tanh(logits / self.cap) * self.cap).masked_fill(logits.isneginf(), -torch.inf)


def special_tokens_of(config: GenerationConfig | None) -> GenerationConfig:
    """A generation config with the special tokens of another one, and no other option."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(config, name, None) for name in names})


def _moved(rows: Tensor, order: Tensor) -> Tensor:
    """(B, T, d) and places (B, T) -> (B, T, d), the rows at these places."""
    first = torch.arange(len(order), device=order.device).unsqueeze(1) * order.shape[1]  # (B, 1)
    return rows.flatten(0, 1).index_select(0, (first + order).flatten()).unflatten(0, tuple(order.shape))


def load_tokenizer(name: str) -> PromptTokenizer:
    """The tokenizer of a language model, by hub name or folder. Raises UserError where it is not found."""
    return PromptTokenizer(_folder(name))


def _folder(name: str) -> str:
    """The name on the hub, or the folder, from which a language model is loaded."""
    if name.startswith(gguf.PREFIX):
        return str(gguf.unpacked(Path(name.removeprefix(gguf.PREFIX))))
    if towers.is_own(name):
        return str(towers.folder_of(name))
    folder = str(TOY / "opt") if name == "toy" else name
    if not Path(folder).exists():
        stay_offline_without_hub()
    return folder


def load_lm(
    name: str,
    dtype: str = "float32",
    random_weights: bool = False,
    quantize: Quantized | None = None,
    rows: Sequence[str] = (RET_TOKEN,),
    places: Sequence[str] = (IMAGE_TOKEN,),
) -> LanguageModel:
    """Load and freeze a causal LM by its name. rows, places: see PromptTokenizer.

    name: a hub name, a folder, 'gguf:FILE', one of fromage.models.towers, or 'toy' for that in the package.

    random_weights: build the architecture from its configuration alone, for tests and timing. quantize: store the linear
    layers, except the head, in int8 (LLM.int8) or in 4 bits (NF4, QLoRA) by bitsandbytes; they compute in dtype. Raises
    UserError for an unknown name, and for weights that are incomplete or neither on disk nor on the hub.
    """
    if quantize and random_weights:
        raise UserError("quantize needs weights to quantise: leave out random_weights, or quantize")
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "output_loading_info": True}
    options |= {"quantization_config": _quantization(quantize, dtype)} if quantize else {}
    auto: Any = AutoModelForCausalLM
    if name == "toy":
        disable_progress_bar()  # its weights load at once
    folder = _folder(name)
    log.info("loading %s ...", name)
    tokenizer = PromptTokenizer(folder, rows, places)
    try:
        if random_weights:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            hf, found = auto.from_config(config, dtype=DTYPES[dtype]), {"missing_keys": ()}
        else:
            hf, found = auto.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:
        raise UserError(
            f"language model {name}: no weights on disk or within reach ({first_line(error)}); "
            "give a folder, or fetch it where there is a network: hf download " + name
        ) from error
    require_weights(f"language model {name}", found["missing_keys"])
    for module in hf.modules():
        # gradients do not pass through 4-bit weights repacked by bitsandbytes
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    lm = LanguageModel(hf, tokenizer, name, quantize)
    if getattr(hf, "hf_quantizer", None) is None:  # quantised layers may run on a GPU alone
        check_parts(lm)
    return lm


@torch.no_grad()
def check_parts(lm: LanguageModel) -> None:
    """Raise UserError unless embedding, layers and head, run one after another, give the logits of the whole model.

    They do not where a family does more with words than to embed them (Falcon-H1 scales them), or has more in its head than
    a linear map and a soft cap (the decoders of ModernBERT).
    """
    device, V = lm.hf.get_input_embeddings().weight.device, lm.added.vocab_size
    ids = torch.arange(5, device=device).unsqueeze(0) * (V - 1) // 4  # (1, 5), spread over the vocabulary
    mask = torch.ones_like(ids, dtype=torch.bool)
    odd: Exception | None = None
    whole = lm.hf(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[..., :V].float()  # (1, 5, V)
    if not whole.isfinite().all():
        told = "its logits are not finite: its weights are damaged, or too large for its dtype"
        raise UserError(f"language model {lm.name}: {told}; fetch it again, or choose another dtype")
    try:
        parts = lm.logits(lm(lm.embed(ids), mask))[..., :V]
        same = bool((parts - whole).abs().max() <= ROUNDING[lm.dtype] * whole.std())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # it does not run without ids
        same, odd = False, error
    if not same:
        raise UserError(
            f"language model {lm.name}: {lm.hf.config.model_type} does more with words than to embed them, or has more than "
            "a linear head, so images cannot be read and [RET] cannot be trained as they are; choose another"
            + (f" ({first_line(odd)})" if odd else "")
        ) from odd


def _quantization(kind: Quantized, dtype: str) -> BitsAndBytesConfig:
    if not is_bitsandbytes_available():
        raise UserError(f"quantize {kind} needs bitsandbytes: {pip_install('quant')}")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPES[dtype]
    )
