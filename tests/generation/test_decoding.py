"""Decoding against Hugging Face, against decoding without a cache and against single prompts; and the rules of [RET]."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fromage.config import FromageConfig
from fromage.data.tokenizer import PromptTokenizer, ret_tokens
from fromage.errors import UserError
from fromage.generation import decoding
from fromage.generation.decoding import PartialAnswer, certain, end_ids
from fromage.generation.generate import generate
from fromage.generation.options import Decoding
from fromage.generation.score import score, score_prompts
from fromage.models.fromage import Fromage
from fromage.models.frozen import TOY
from fromage.models.language_model import LanguageModel, load_lm
from fromage.models.prompts import RET, embed_prompts
from fromage.models.vision.registry import load_vision

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
FAMILIES = {
    "llama": lambda rows: LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=False, **SMALL)),
    "qwen": lambda rows: Qwen2ForCausalLM(Qwen2Config(vocab_size=rows, **SMALL)),
    "gemma": lambda rows: Gemma2ForCausalLM(Gemma2Config(vocab_size=rows, head_dim=8, sliding_window=16, **SMALL)),
    "gpt2": lambda rows: GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
}
CHATTY = Decoding(14, min_tokens=3, ret_bias=50.0, max_images=2)


@pytest.fixture(scope="module", params=["opt", *FAMILIES])
def model(request):
    torch.manual_seed(1)
    lm = load_lm("toy")
    if request.param != "opt":
        hf = FAMILIES[request.param](lm.tokenizer.vocab_size + 3).eval()
        with torch.no_grad():  # random weights all but repeat their input; these say something
            for p in hf.parameters():
                p.mul_(3 if p.ndim > 1 else 1)
        lm = LanguageModel(hf, lm.tokenizer, request.param)
    return Fromage(lm, load_vision("toy"), FromageConfig(k=2, q=16))


@pytest.fixture(scope="module")
def prompts(world):
    images = sorted((world / "coco" / "val2017").glob("*"))
    return [["a big heart", images[0], "and a"], ["a small"], [images[1], "on the left of", images[2]], []]


def test_tokens_are_computed_with_weights_in_float16_where_that_is_asked_for(prompts, monkeypatch):
    """The prompt is not: it has more rows."""
    model = Fromage.load(k=2, q=16)
    used = []
    made = decoding.halves_of(model.lm.hf)
    if not made:
        pytest.skip("PyTorch has no such kernel for this processor")
    monkeypatch.setattr(decoding, "halves_of", lambda hf: used.append(hf) or made)
    exact = generate(model, prompts[:1], CHATTY)
    assert not used
    assert [answer.ids for answer in generate(model, prompts[:1], replace(CHATTY, half_weights=True))] == [exact[0].ids]
    assert used == [model.lm.hf]


@pytest.mark.parametrize("decoding", [Decoding(12), CHATTY], ids=["plain", "chatty"])
def test_batch_single_cached_and_uncached_agree(model, prompts, decoding):
    together = generate(model, prompts, decoding)
    alone = [generate(model, [prompt], decoding)[0] for prompt in prompts]
    uncached = generate(model, prompts, Decoding(**{**vars(decoding), "use_cache": False}))
    assert len({tuple(answer.ids) for answer in together}) > 1
    for a, b, c in zip(together, alone, uncached, strict=True):
        assert a.ids == b.ids == c.ids and a.parts == b.parts == c.parts
        for mine, theirs, slow in zip(a.shown, b.shown, c.shown, strict=True):
            assert mine.embedding == pytest.approx(theirs.embedding, abs=1e-4)
            assert mine.embedding == pytest.approx(slow.embedding, abs=1e-4)


def test_text_prompts_continue_as_hugging_face_does(model):
    for text in ("a big heart and", "the"):
        ids = torch.tensor([model.tokenizer.start() + model.tokenizer.encode(text)])
        made = model.lm.hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, repetition_penalty=1.0,
            suppress_tokens=[model.tokenizer.ret_id], pad_token_id=1, eos_token_id=model.tokenizer.eos_id,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        answer = generate(model, [text], Decoding(12, max_images=0))[0]
        assert answer.ids == [i for i in made if i != model.tokenizer.eos_id]
        assert answer.text == model.tokenizer.decode(answer.ids).strip()


@pytest.mark.parametrize(
    "options",
    [{"no_repeat_ngram_size": 1, "max_time": 0.0}, {"num_return_sequences": 2, "num_beams": 2}, {"stop_strings": ["a"]}],
)
def test_the_language_models_own_generation_config_changes_no_answer(toy_model, options):
    hf = OPTForCausalLM.from_pretrained(TOY / "opt")
    hf.generation_config.update(do_sample=True, temperature=0.6, repetition_penalty=1.3, eos_token_id=[2, 9], **options)
    model = Fromage(LanguageModel(hf, toy_model.tokenizer, "toy"), toy_model.vision, FromageConfig(k=2, q=32))
    text = Decoding(12, max_images=0)
    assert generate(model, ["a big heart and"], text)[0].ids == generate(toy_model, ["a big heart and"], text)[0].ids
    assert end_ids(model) == [2, 9]


@torch.no_grad()
def hidden_after(model, prompt, ids):
    """The hidden state where the last of ids after a prompt is read, by one pass over all."""
    batch = embed_prompts(model, [prompt])
    embeds = torch.cat([batch.embeds, model.embed(torch.tensor([ids]))], 1)
    return model.lm(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool))[0, -1]


@pytest.mark.parametrize("length", [5, 4])  # the second ends with the second [RET]
def test_a_ret_is_embedded_where_it_is_read(model, prompts, length):
    decoding = Decoding(length, min_tokens=2, ret_bias=1e4, max_images=2)
    for prompt, answer in zip(prompts, generate(model, prompts, decoding), strict=True):
        ret = model.tokenizer.ret_id
        assert [i for i, token in enumerate(answer.ids) if token == ret] == [2, 3]
        for place, shown in zip((2, 3), answer.shown, strict=True):
            want = model.embed_ret(hidden_after(model, prompt, answer.ids[: place + 1])[None, None])[0]
            torch.testing.assert_close(torch.from_numpy(shown.embedding), want.detach(), atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module", params=["sequential", "stacked"])
def three(request, model):
    """Models of three [RET] tokens, of each family and what the tokens see."""
    torch.manual_seed(1)
    folder, frozen = str(TOY / "opt"), model.lm.hf
    hf = type(frozen)(frozen.config).eval()
    state = {name.replace(".frozen", ""): value for name, value in frozen.state_dict().items()}
    assert not hf.load_state_dict(state, strict=False).unexpected_keys
    lm = LanguageModel(hf, PromptTokenizer(folder, ret_tokens(3)), model.lm.name)
    if getattr(hf.config, "sliding_window", None):
        hf.config.sliding_window = 64
    for layer in hf.base_model.modules():
        if getattr(layer, "sliding_window", None):
            layer.sliding_window = 64
    config = FromageConfig(k=2, q=16, r=3, ret_attention=request.param, ret_fusion="transformer")
    return Fromage(lm, load_vision("toy"), config).eval()


@torch.no_grad()
def test_the_tokens_behind_the_first_ret_follow_it_unchosen(three, prompts):
    ids, ends = three.tokenizer.ret_ids, [i for i in end_ids(three) if i < three.tokenizer.vocab_size]
    decoding = Decoding(12, min_tokens=2, min_new_tokens=12, ret_bias=1e4, max_images=2)
    together = generate(three, prompts, decoding)
    uncached = generate(three, prompts, replace(decoding, use_cache=False))
    for prompt, answer, slow in zip(prompts, together, uncached, strict=True):
        (alone,) = generate(three, [prompt], decoding)
        assert answer.ids == alone.ids == slow.ids and len(answer.shown) == 2 and len(answer.ids) == 12
        assert answer.ids[2:8] == ids * 2 and not set(ids) & {*answer.ids[:2], *answer.ids[8:]}
        batch = embed_prompts(three, [prompt])
        answered = torch.tensor([answer.ids])
        embeds, whole = torch.cat([batch.embeds, three.embed(answered)], 1), torch.cat([batch.ids, answered], 1)
        mask = torch.ones(whole.shape, dtype=torch.bool)
        hidden = three.lm(embeds, mask, three.positions(whole, mask))[:, -12:]
        for place, *shown in zip((2, 5), answer.shown, alone.shown, slow.shown, strict=True):
            want = three.embed_ret(hidden[:, place : place + 3])[0].numpy()
            assert all(found.embedding == pytest.approx(want, abs=2e-4) for found in shown)
        logits = three.lm.logits(hidden[0, 7:-1])  # (4, V + 4), those of the text after both
        logits[:, [three.tokenizer.image_id, *ids, *ends]] = -torch.inf
        assert logits.argmax(1).tolist() == answer.ids[8:]


def test_ret_does_not_begin_where_it_has_no_room(three):
    for length, shown in ((2, 0), (3, 1), (5, 1), (6, 2)):
        (answer,) = generate(three, ["a"], Decoding(length, ret_bias=1e4, max_images=2, min_new_tokens=length))
        assert len(answer.shown) == shown and len(answer.ids) == length
    (answer,) = generate(three, ["a"], Decoding(9, ret_bias=1e4, end_at_image=True))
    assert answer.ids == three.tokenizer.ret_ids


@torch.no_grad()
def test_a_prompt_with_several_ret_tokens_within_is_scored_and_continued_as_in_one_pass(three):
    prompt, text = ["a red star", RET, "and a"], " big heart"
    (likelihoods, _), ids = score(three, prompt, [text]), three.tokenizer.encode(text)
    batch = embed_prompts(three, [prompt])
    whole = torch.cat([batch.ids, torch.tensor([ids])], 1)
    mask = torch.ones(whole.shape, dtype=torch.bool)
    logits = three.lm.logits(three.lm(three.embed(whole), mask, three.positions(whole, mask)))[0].log_softmax(-1)
    likely = logits[:-1].gather(1, whole[0, 1:, None])[:, 0]  # (T - 1,)
    torch.testing.assert_close(likelihoods[0], likely[-len(ids) :].sum(), atol=1e-4, rtol=1e-4)
    scored = score_prompts(three, [prompt, "a"])
    want = likely[: batch.ids.shape[1] - 1]
    assert want.isinf().sum() == 2 and scored.tokens[0] == len(want) - 2
    torch.testing.assert_close(scored.total[0], want[want.isfinite()].sum(), atol=1e-4, rtol=1e-4)
    (answer,) = generate(three, [prompt], Decoding(1, max_images=0, min_new_tokens=1))
    logits[batch.ids.shape[1] - 1, [three.tokenizer.ret_id, three.tokenizer.eos_id]] = -torch.inf
    assert answer.ids == [int(logits[batch.ids.shape[1] - 1].argmax())]


def test_the_first_place_where_it_may_come(toy_model, prompts):
    ret = toy_model.tokenizer.ret_id
    for least in (0, 1, 4):
        for answer in generate(toy_model, prompts, Decoding(8, min_tokens=least, min_new_tokens=least, ret_bias=1e4)):
            assert answer.ids.index(ret) == least and answer.ids.count(ret) == 1
    (answer,) = generate(toy_model, ["a"], Decoding(1, ret_bias=1e4))
    assert answer.ids == [ret] and len(answer.parts) == 1


@pytest.mark.parametrize("most", [0, 1, 3])
def test_no_more_images_than_allowed(toy_model, prompts, most):
    for answer in generate(toy_model, prompts, Decoding(10, ret_bias=1e4, max_images=most)):
        assert len(answer.shown) == answer.ids.count(toy_model.tokenizer.ret_id) == most


def test_bias_and_the_authors_scale(toy_model):
    """A bias of the size of the gap tips the balance. The scale moves a negative logit the wrong way."""
    ret, batch = toy_model.tokenizer.ret_id, embed_prompts(toy_model, ["a"])
    with torch.no_grad():
        logits = toy_model.lm.logits(toy_model.lm(batch.embeds, batch.mask))[0, -1]
        gap = float(logits[:ret].max() - logits[ret])
        for bias, first in ((gap - 0.01, False), (gap + 0.01, True)):
            assert (generate(toy_model, ["a"], Decoding(1, ret_bias=bias))[0].ids == [ret]) is first
        toy_model.ret.input.copy_(toy_model.ret.input * torch.sign(logits[ret]) * 1e-3)
        for scale, first in ((1e6, True), (-1e6, False)):
            assert (generate(toy_model, ["a"], Decoding(1, authors_ret_scale=scale))[0].ids == [ret]) is first


def test_no_end_before_the_least_length(toy_model, monkeypatch):
    (free,) = generate(toy_model, ["a"], Decoding(8, max_images=0))
    monkeypatch.setattr(toy_model.tokenizer, "eos_id", free.ids[2])  # now the third token is the end
    monkeypatch.setattr(toy_model.lm.hf.generation_config, "eos_token_id", None)
    assert generate(toy_model, ["a"], Decoding(8, max_images=0))[0].ids == free.ids[: free.ids.index(free.ids[2])]
    longer = generate(toy_model, ["a"], Decoding(8, min_new_tokens=6, max_images=0))[0].ids
    assert len(longer) >= 6 and free.ids[2] not in longer


def test_stop_texts_end_the_answer_and_are_no_part_of_it(toy_model):
    (free,) = generate(toy_model, ["a"], Decoding(20, max_images=0))
    whole = free.parts[0]
    word = whole.split()[2]
    for stop in (word, f"{word[:-1]}", (word, "never said"), f" {word}"):
        (answer,) = generate(toy_model, ["a"], Decoding(20, max_images=0, stop=stop))
        text = stop[0] if isinstance(stop, tuple) else stop
        assert answer.parts == [whole[: whole.index(text)]] and len(answer.ids) < len(free.ids)
    assert generate(toy_model, ["a"], Decoding(20, max_images=0, stop="never said"))[0].ids == free.ids


def test_an_answer_is_cut_where_nothing_but_its_length_ends_it(toy_model, monkeypatch):
    (free,) = generate(toy_model, ["a"], Decoding(6, max_images=0))
    whole = free.parts[0]
    assert free.cut and len(free.ids) == 6
    (stopped,) = generate(toy_model, ["a"], Decoding(6, max_images=0, stop=whole[-4:]))
    assert len(stopped.ids) == 6 and not stopped.cut and stopped.parts == [whole[:-4]], "met at the last token"
    last = Decoding(6, min_tokens=5, ret_bias=60.0)
    (pictured,), (ended,) = (generate(toy_model, ["a"], how) for how in (last, replace(last, end_at_image=True)))
    assert pictured.ids == ended.ids and len(ended.ids) == 6 and pictured.cut and not ended.cut


def test_one_row_that_stops_does_not_touch_the_others(toy_model):
    prompts = ["a", "a big heart and", "the small"]
    free = generate(toy_model, prompts, Decoding(16, max_images=0))
    stop = free[0].parts[0].split()[1]
    for row, prompt in zip(generate(toy_model, prompts, Decoding(16, max_images=0, stop=stop)), prompts, strict=True):
        assert row == generate(toy_model, [prompt], Decoding(16, max_images=0, stop=stop))[0]


def test_certain_text():
    assert certain("a caf\ufffd", ()) == "a caf"
    assert certain("one END", ["END."]) == "one "
    assert certain("one E and", ["END."]) == "one E and"
    assert certain("aab", ["aabb", "bc"]) == ""


def test_sampling_is_reproducible_and_leaves_the_global_generator_alone(toy_model):
    prompts, decoding = ["a", "the big"], Decoding(10, temperature=1.0, seed=3, max_images=0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generate(toy_model, prompts, decoding)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(9)
    assert generate(toy_model, prompts, decoding) == first
    assert generate(toy_model, prompts, decoding, batch_size=1) == first
    assert generate(toy_model, prompts[1:], Decoding(10, temperature=1.0, seed=4, max_images=0)) == first[1:]
    assert generate(toy_model, prompts, Decoding(10, temperature=1.0, seed=5, max_images=0)) != first
    unseeded = Decoding(10, temperature=1.0, max_images=0)
    assert len({tuple(answer.ids) for answer in generate(toy_model, ["a"] * 8, unseeded)}) > 1


def test_sampling_follows_the_distribution(toy_model):
    batch = embed_prompts(toy_model, ["a"])
    with torch.no_grad():
        logits = toy_model.lm.logits(toy_model.lm(batch.embeds, batch.mask))[0, -1]
    logits[toy_model.tokenizer.ret_id] = -torch.inf
    want = (logits / 0.7).softmax(-1)
    options = {"temperature": 0.7, "seed": 0, "max_images": 0, "min_new_tokens": 1}
    want[toy_model.tokenizer.eos_id] = 0
    drawn = generate(toy_model, ["a"] * 2000, Decoding(1, **options), batch_size=500)
    got = torch.bincount(torch.tensor([answer.ids[0] for answer in drawn]), minlength=len(want)) / 2000
    assert (got - want / want.sum()).abs().sum() / 2 < 0.08  # total variation
    top = set(want.topk(3).indices.tolist())
    narrow = generate(toy_model, ["a"] * 200, Decoding(1, top_k=3, **options), batch_size=200)
    assert {answer.ids[0] for answer in narrow} <= top
    one = generate(toy_model, ["a"] * 50, Decoding(1, top_p=float(want.max()) / 2, **options))
    assert {answer.ids[0] for answer in one} == {int(want.argmax())}


def test_repetition_penalty_counts_the_answer_only(toy_model):
    prompt = "a small red heart"
    free = generate(toy_model, [prompt], Decoding(24, min_new_tokens=24, max_images=0))[0].ids
    strict = generate(toy_model, [prompt], Decoding(24, min_new_tokens=24, max_images=0, repetition_penalty=1e6))[0].ids
    assert strict[0] == free[0] and len(set(free)) < len(set(strict)) == 24


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0}, {"min_tokens": -1}, {"min_tokens": 9, "max_new_tokens": 8}, {"temperature": -0.1},
        {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"repetition_penalty": 0}, {"stop": ""},
        {"stop": ["a", ""]}, {"ret_bias": float("inf")}, {"authors_ret_scale": float("nan")}, {"max_images": -1},
        {"images_per_ret": 0}, {"temperature": 1e-40}, {"temperature": 1e300}, {"repetition_penalty": 1e300},
        {"max_new_tokens": "5"}, {"max_new_tokens": 2.5}, {"temperature": "hot"}, {"temperature": None}, {"stop": None},
        {"stop": 5}, {"stop": [5]}, {"seed": "x"}, {"seed": 1.5}, {"seed": 2**64}, {"max_images": 1.5},
        {"images_per_ret": 1.5}, {"top_p": None}, {"ret_bias": "x"},
    ],
)  # fmt: skip
def test_options_that_mean_nothing(options):
    with pytest.raises(UserError, match=f"{next(iter(options))} is .* must be"):
        Decoding(**options)


def test_numbers_of_numpy_are_numbers():
    assert Decoding(np.int64(5), temperature=np.float32(0.5), stop=["a"]) == Decoding(5, temperature=0.5, stop="a")


def test_an_answer_must_have_room(toy_model):
    with pytest.raises(UserError, match="600 after it"):
        generate(toy_model, ["a"], Decoding(600))


def test_a_draft_that_another_thread_ends_meanwhile_stays_ended():
    """It is only ever set to True: False may be what it was before the other thread set it."""

    class Watched(PartialAnswer):
        def __setattr__(self, name, value):
            assert name != "done" or value or not self.ids
            super().__setattr__(name, value)

    model = Fromage.load(k=2, q=16)
    draft, token = Watched(model, Decoding(2), lambda piece: None), model.tokenizer.encode("star")[0]
    draft.step(token, torch.zeros(model.lm.width))
    assert not draft.done
    draft.step(token, torch.zeros(model.lm.width))
    assert draft.done
