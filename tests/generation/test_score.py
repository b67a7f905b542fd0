"""Scores of continuations against whole passes, one for each."""

import threading

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fromage.config import FromageConfig
from fromage.data.batches import Batch
from fromage.errors import UserError
from fromage.generation.generate import stream
from fromage.generation.options import Decoding
from fromage.generation.score import score, score_prompts
from fromage.models.fromage import Fromage
from fromage.models.language_model import LanguageModel, load_lm
from fromage.models.packed_attention import CausalAttention, attending, route
from fromage.models.packed_layout import PackedLayout
from fromage.models.prompts import RET, embed_prompts, encode_images
from fromage.models.vision.registry import load_vision
from fromage.training.fast_step import fast_step
from fromage.training.reference_step import reference_step

TEXTS = ["a red star", "blue", "a small ring on the left of a big green square, at night.", "star", "on the sea"]


@pytest.fixture(scope="module", params=["opt", "llama"])
def model(request):
    """Tied and untied, with as many and with fewer heads of keys than of queries."""
    torch.manual_seed(1)
    lm = load_lm("toy")
    if request.param == "llama":
        config = LlamaConfig(vocab_size=lm.tokenizer.vocab_size + 3, hidden_size=32, intermediate_size=48,
                             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                             max_position_embeddings=128)  # fmt: skip
        lm = LanguageModel(LlamaForCausalLM(config), lm.tokenizer, "llama")
    return Fromage(lm, load_vision("toy"), FromageConfig(k=2, q=16))


@pytest.fixture
def prompt(world):
    images = sorted((world / "coco" / "val2017").glob("*"))
    return ["a big heart", images[0], "and then", images[1], "is"]


@torch.no_grad()
def whole_pass(model, prompt, text, unshifted=False):
    """The definition: one pass over prompt and continuation, and the logits before (or at) each token."""
    batch = embed_prompts(model, [prompt])
    ids = torch.tensor([model.tokenizer.encode(text)])
    embeds = torch.cat([batch.embeds, model.embed(ids)], 1)
    logits = model.lm.logits(model.lm(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool)))[0]
    first = batch.ids.shape[1] - (0 if unshifted else 1)
    return logits[first : first + ids.shape[1]].log_softmax(-1).gather(1, ids[0].unsqueeze(1)).sum()


@pytest.mark.parametrize("unshifted", [False, True])
@pytest.mark.parametrize("chunk", [512, 7, 1])
def test_scores_are_those_of_whole_passes(model, prompt, chunk, unshifted, monkeypatch):
    monkeypatch.setattr("fromage.generation.score.CHUNK", chunk)
    monkeypatch.setattr("fromage.generation.score.LOGITS", chunk)
    scores = score(model, prompt, TEXTS, unshifted)
    want = torch.stack([whole_pass(model, prompt, text, unshifted) for text in TEXTS])
    torch.testing.assert_close(scores.total, want, atol=1e-4, rtol=1e-4)
    counts = torch.tensor([len(model.tokenizer.encode(text)) for text in TEXTS])
    assert scores.tokens.equal(counts)
    torch.testing.assert_close(scores.mean, want / counts, atol=1e-4, rtol=1e-4)


def test_candidates_do_not_see_one_another(model, prompt):
    alone = torch.cat([score(model, prompt, [text]).total for text in TEXTS])
    torch.testing.assert_close(score(model, prompt, TEXTS).total, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(score(model, prompt, TEXTS[::-1]).total.flip(0), alone, atol=1e-4, rtol=1e-4)


def test_the_likelihoods_of_all_tokens_sum_to_one(model, prompt, monkeypatch):
    """All of the vocabulary, [RET] included, as one-token continuations."""
    every = [*range(model.tokenizer.vocab_size), model.tokenizer.ret_id]
    monkeypatch.setattr(model.tokenizer, "encode", lambda text: [int(text)] if text.isdigit() else [5])
    total = score(model, prompt, [str(i) for i in every]).total.exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0), atol=1e-4, rtol=1e-4)


def test_nothing_to_score(model, prompt):
    with pytest.raises(UserError, match="continuation 1 is empty"):
        score(model, prompt, ["a", ""])
    none = score(model, prompt, [])
    assert none.total.shape == none.tokens.shape == (0,)


def test_too_long(model, prompt):
    with pytest.raises(UserError, match="shorten"):
        score(model, prompt, ["star " * model.lm.max_length])


@torch.no_grad()
def test_a_caption_as_a_whole_prompt_has_the_loss_of_captioning(model, world):
    images = encode_images(model, sorted((world / "coco" / "val2017").glob("*"))[:3])
    texts = ["a red star.", "blue", "a small ring, at night, on the left of it."]
    rows = [model.tokenizer.caption(text, 99) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), True, model.tokenizer.pad_id)
    batch = Batch(["a", "b", "c"], texts, ids, list(map(len, rows)), None, images)
    loss = reference_step(model, batch, paired=False).captioning_loss
    scores = score_prompts(model, [[image, text] for image, text in zip(images, texts, strict=True)], batch_size=2)
    assert scores.tokens.tolist() == [len(row) - 1 for row in rows], "</s> after the image is scored, [RET] is not there"
    torch.testing.assert_close(-scores.total.sum() / scores.tokens.sum(), loss, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_parts_of_a_whole_prompt_add_up(model, prompt):
    whole = score_prompts(model, [["a star"], [*prompt, " red"], ["a", RET]])
    rest = score(model, prompt, [" red"])
    before = score_prompts(model, [prompt])
    torch.testing.assert_close(whole.total[1], before.total[0] + rest.total[0], atol=1e-3, rtol=1e-4)
    assert whole.tokens[1] == before.tokens[0] + rest.tokens[0]
    assert whole.tokens[2] == 1 + len(model.tokenizer.encode("a")), "[RET] is scored"
    assert score_prompts(model, []).total.shape == (0,)
    with pytest.raises(UserError, match="no text after its first token"):
        score_prompts(model, [["a"], []])


LONG = Decoding(max_new_tokens=90, min_new_tokens=90, max_images=0)


def captioning(model):
    """Losses of a training step over two captions."""
    rows = [model.tokenizer.caption(text, 99) for text in TEXTS[:2]]
    ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), True, model.tokenizer.pad_id)
    features = torch.linspace(-1, 1, 2 * model.vision.width).reshape(2, -1)
    return fast_step(model, Batch(["a", "b"], TEXTS[:2], ids, list(map(len, rows)), None, features), paired=False)


def test_scores_and_training_between_the_pieces_of_an_answer(model):
    answer, scores = list(stream(model, "a red", LONG)), score(model, "a", TEXTS).total
    losses = captioning(model)
    pieces = stream(model, "a red", LONG)
    got = [next(pieces)]
    for _ in range(3):
        torch.testing.assert_close(score(model, "a", TEXTS).total, scores)
        torch.testing.assert_close(captioning(model).captioning_loss, losses.captioning_loss)
        got.append(next(pieces))
    assert "".join([*got, *pieces]) == "".join(answer)


def test_two_threads_score_while_a_third_decodes(model):
    answer, scores, failed = "".join(stream(model, "a red", LONG)), score(model, "a", TEXTS).total, []

    def work():
        try:
            for _ in range(8):
                torch.testing.assert_close(score(model, "a", TEXTS).total, scores)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    said = ["".join(stream(model, "a red", LONG)) for _ in range(2)]
    for thread in threads:
        thread.join()
    assert said == [answer] * 2 and not failed


def test_a_model_keeps_the_attention_it_was_loaded_with():
    """Eager attention is a function of the model's own module; packed sequences do without it."""
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config._attn_implementation = "eager"
    hf, embeds = LlamaForCausalLM(config).eval(), torch.randn(1, 6, 32)
    with torch.no_grad():
        alone = hf.model(inputs_embeds=embeds).last_hidden_state
        route(config)
        route(config)
        torch.testing.assert_close(hf.model(inputs_embeds=embeds).last_hidden_state, alone, rtol=0, atol=0)
        layout = PackedLayout([6], embeds.device)
        with attending(CausalAttention(layout)):
            packed = hf.model(inputs_embeds=embeds, position_ids=layout.positions[None], use_cache=False).last_hidden_state
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
