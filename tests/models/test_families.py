"""Language models of other families than OPT, random and tiny: the fast step, generation and scoring are exact with each."""

import pytest
import torch
import transformers as hf
from test_fast_step import NoTower, compare, make_batch, run
from test_score import whole_pass

from fromage.config import FromageConfig
from fromage.data.tokenizer import PromptTokenizer, ret_tokens
from fromage.errors import UserError
from fromage.generation.generate import generate
from fromage.generation.options import Decoding
from fromage.generation.score import score
from fromage.models.fromage import Fromage
from fromage.models.frozen import TOY
from fromage.models.language_model import LanguageModel, check_parts
from fromage.training.fast_step import fast_step
from fromage.training.reference_step import reference_step

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 128, "initializer_range": 0.3}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 500000.0}
LLAMA_3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SMOLLM2 = {"hidden_size": 36, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 9, "head_dim": 4}
SMOLLM2 |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "tie_word_embeddings": True}
SMOLLM2 |= {"num_key_value_heads": 3, "max_position_embeddings": 128, "initializer_range": 0.3}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}  # low enough to bend these small logits
LOCAL = {  # a local layer, then a global one, each with a rotation of its own
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    },
}
ALIBI = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
OWN = {  # an attention of their own, or none in places
    "bloom": (hf.BloomConfig, ALIBI),
    "mpt": (hf.MptConfig, {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "initializer_range": 0.3}),
    "falcon": (hf.FalconConfig, SIZES | {"alibi": True, "new_decoder_architecture": False}),
    "gpt-oss": (hf.GptOssConfig, GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1}),
}
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
    "llama 3": (hf.LlamaConfig, GROUPED | {"rope_parameters": LLAMA_3}),
    "smollm2": (hf.LlamaConfig, SMOLLM2),
    "mistral": (hf.MistralConfig, GROUPED | {"sliding_window": 5}),
    "qwen2": (hf.Qwen2Config, GROUPED),
    "qwen3": (hf.Qwen3Config, GROUPED | {"head_dim": 16, "tie_word_embeddings": True}),
    "phi": (hf.PhiConfig, SIZES),
    "granite": (
        hf.GraniteConfig,
        GROUPED | {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    ),
    "cohere": (hf.CohereConfig, GROUPED | {"logit_scale": 0.25}),
    "hyperclovax": (hf.HyperCLOVAXConfig, GROUPED | {"logits_scaling": 0.25}),
    "gemma": (hf.GemmaConfig, GROUPED),
    "gemma2": (hf.Gemma2Config, GROUPED | {"query_pre_attn_scalar": 8, "sliding_window": 5} | CAPS),
    "gemma3": (hf.Gemma3TextConfig, GROUPED | {"query_pre_attn_scalar": 8, "sliding_window": 5} | LOCAL),
}
STARTS = ("bos, eos and pad", "pad is eos", "no bos, pad is eos", "bos opens a turn, eos ends it")


def build(family, start=STARTS[0], k=1, r=1, sees="sequential", **more):
    torch.manual_seed(0)
    tokenizer = PromptTokenizer(str(TOY / "opt"), ret_tokens(r))
    kind, sizes = (FAMILIES | OWN)[family]
    config = kind(vocab_size=tokenizer.vocab_size + 7, **sizes | more)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 1, 2, 2
    lm = hf.AutoModelForCausalLM.from_config(config)
    if start == STARTS[3]:  # as SmolLM2-Instruct: <|im_start|>, <|im_end|>
        tokenizer.bos_id, config.bos_token_id = 4, 4
    elif start != STARTS[0]:  # without padding of its own, end of text stands for it
        tokenizer.pad_id = tokenizer.eos_id
    if start == STARTS[2]:
        tokenizer.bos_id = None
    return Fromage(LanguageModel(lm, tokenizer, family), NoTower(), FromageConfig(k=k, q=16, r=r, ret_attention=sees))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_step_is_exact(family, start):
    model = build(family, start, k=2)
    for paired in (False, True):
        compare(model, make_batch(model, [5, 12, 3, 24, 7]), paired)


@pytest.mark.parametrize("sees", ["sequential", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_step_is_exact_with_several_ret_tokens(family, sees):
    wide = {"sliding_window": 64} if sees == "stacked" and "sliding_window" in FAMILIES[family][1] else {}
    model = build(family, k=2, r=4, sees=sees, **wide)
    compare(model, make_batch(model, [5, 12, 3, 24, 7]), True)


@pytest.mark.parametrize("family", ["bloom", "mistral"])
def test_where_ret_cannot_be_stacked_outside_of_packed_sequences(family):
    model = build(family, r=2, sees="stacked")
    with pytest.raises(UserError, match="so \\[RET\\] cannot be stacked" if family == "bloom" else "looks back 5 in places"):
        model.embed_text(["a red star on the sand by night"])


@pytest.mark.parametrize("family", FAMILIES | OWN)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model_itself(family):
    model = build(family)
    embeds = model.embed(torch.tensor([[2, 9, 40, 7, 100]]))  # (1, T, d)
    ours = model.lm.logits(model.lm(embeds, torch.ones(1, 5, dtype=torch.bool)))
    theirs = model.lm.hf(inputs_embeds=embeds, use_cache=False).logits
    words = model.lm.added.vocab_size
    torch.testing.assert_close(ours[..., :words], theirs[..., :words].float(), rtol=1e-4, atol=1e-4)
    check_parts(model.lm)


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "gemma3"])
def test_ret_enters_as_long_as_an_ordinary_token(family):
    model = build(family)
    words, ret = (model.lm.embed(torch.tensor([ids])).norm(dim=-1) for ids in (range(50), [model.tokenizer.ret_id]))
    assert ret.item() == pytest.approx(words.mean().item(), rel=0.3)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_a_window_is_honoured_where_sequences_are_packed(family):
    model = build(family)
    before = score(model, "a red star on the sand", ["by night and by day"]).total
    prompt = ["a small blue ring on the left", "a red star on the sand"]
    torch.testing.assert_close(score(model, prompt, [" red."]).total[0], whole_pass(model, prompt, " red."))
    model = build(family, sliding_window=64)
    assert (score(model, "a red star on the sand", ["by night and by day"]).total - before).abs() > 1e-2, "it matters"


@pytest.mark.parametrize("family", ["opt", "mistral", "gemma3", "bloom", "mpt", "falcon"])
def test_padding_between_tokens_changes_nothing(family):
    model = build(family)
    embeds, mask = torch.randn(2, 16, 32), torch.rand(2, 16) < 0.6
    got = model.lm(embeds, mask)
    for row, seen, out in zip(embeds, mask, got, strict=True):
        alone = model.lm(row[seen][None], torch.ones(1, int(seen.sum()), dtype=torch.bool))[0]
        torch.testing.assert_close(out[seen], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", OWN)
def test_an_attention_of_its_own_is_refused_where_sequences_are_packed(family):
    model = build(family)
    batch = make_batch(model, [5, 12, 3])
    for packed in (lambda: score(model, "a red star", [" red."]), lambda: run(fast_step, model, batch, False)):
        with pytest.raises(UserError, match=r"has an attention of its own.*--model.step reference") as error:
            packed()
        assert "\n" not in str(error.value)
    assert run(reference_step, model, batch, False)[0].loss.isfinite()


def test_no_image_token_comes_through_a_soft_cap():
    model = build("gemma2")
    model.lm.hf.config.final_logit_softcapping = 1e-3  # all tokens alike
    logits = model.lm.logits(torch.randn(3, 32))
    assert logits[:, model.tokenizer.image_id].isneginf().all() and logits.isneginf().sum() == 3
    decodings = [Decoding(100, temperature=1.0, seed=seed, min_new_tokens=100) for seed in range(9)]
    answers = [generate(model, ["a red star"], decoding)[0].ids for decoding in decodings]
    assert all(len(ids) == 100 and model.tokenizer.image_id not in ids for ids in answers)


def test_rows_of_their_own_masks_do_not_pass_a_window():
    model = build("mistral")
    positions, mask = torch.arange(6)[None], torch.ones(1, 6, dtype=torch.bool)
    with pytest.raises(UserError, match="6 tokens in a row: mistral looks back 5"):
        model.lm.visible(positions, mask)
    assert (model.lm.visible(positions[:, :5], mask[:, :5])[0, 0] == 0).tolist() == torch.ones(5, 5).tril().bool().tolist()
