"""Language models of other families than OPT, random and tiny: the fast step, generation and scoring are exact with each."""

import pytest
import torch
import transformers as hf
from test_fast_step import NoTower, compare, make_batch
from test_score import whole_pass

from fromage.data.tokenizer import PromptTokenizer
from fromage.errors import UserError
from fromage.generation.decoding import Decoding
from fromage.generation.generate import generate
from fromage.generation.score import score
from fromage.models.fromage import Fromage
from fromage.models.frozen import TOY
from fromage.models.language_model import LanguageModel

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 128, "initializer_range": 0.3}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "opt": (hf.OPTConfig, SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "opt-350m": (
        hf.OPTConfig,
        SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "init_std": 0.3},
    ),
    "gpt2": (hf.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}),
    "pythia": (hf.GPTNeoXConfig, SIZES),
    "llama": (hf.LlamaConfig, GROUPED),
    "llama, tied": (hf.LlamaConfig, GROUPED | {"tie_word_embeddings": True}),
    "mistral": (hf.MistralConfig, GROUPED | {"sliding_window": 64}),
    "qwen2": (hf.Qwen2Config, GROUPED),
    "qwen3": (hf.Qwen3Config, GROUPED),
    "phi": (hf.PhiConfig, SIZES),
    "gemma": (hf.GemmaConfig, GROUPED),
    "gemma2": (hf.Gemma2Config, GROUPED | {"query_pre_attn_scalar": 8, "sliding_window": 64}),
    "gemma3": (hf.Gemma3TextConfig, GROUPED | {"query_pre_attn_scalar": 8, "sliding_window": 64}),
}
STARTS = ("bos, eos and pad", "pad is eos", "no bos, pad is eos")


def build(family, start=STARTS[0], k=1):
    torch.manual_seed(0)
    tokenizer = PromptTokenizer(str(TOY / "opt"))
    kind, sizes = FAMILIES[family]
    config = kind(vocab_size=tokenizer.vocab_size + 7, **sizes)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 1, 2, 2
    lm = hf.AutoModelForCausalLM.from_config(config)
    if start != STARTS[0]:  # without padding of its own, end of text stands for it
        tokenizer.pad_id = tokenizer.eos_id
    if start == STARTS[2]:
        tokenizer.bos_id = None
    return Fromage(LanguageModel(lm, tokenizer, family), NoTower(), k, q=16)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_step_is_exact(family, start):
    model = build(family, start, k=2)
    for paired in (False, True):
        compare(model, make_batch(model, [5, 12, 3, 24, 7]), paired)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_what_single_prompts_give(family):
    model = build(family)
    prompts = [["a red star", torch.ones(20), "by night"], ["the ring"], [torch.zeros(20), "a small blue cross on the sand"]]
    decoding = Decoding(8, ret_bias=1.0)
    together = [answer.text for answer in generate(model, prompts, decoding)]
    assert together == [generate(model, [prompt], decoding)[0].text for prompt in prompts] and any(together)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_full_passes(family):
    model = build(family)
    prompt, texts = [torch.ones(20), "what is it?"], [" red.", " a small ring.", " no, i do not think so."]
    for got, text in zip(score(model, prompt, texts).total, texts, strict=True):
        torch.testing.assert_close(got, whole_pass(model, prompt, text), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_beyond_a_sliding_window_nothing_is_packed(family):
    model = build(family)
    with pytest.raises(UserError, match="looks back 64"):
        score(model, ["a red star " * 30], [" red."])
