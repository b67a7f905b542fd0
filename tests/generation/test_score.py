"""Scores of continuations against whole passes, one for each."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fromage.errors import UserError
from fromage.generation.score import score
from fromage.models.fromage import Fromage
from fromage.models.language_model import LanguageModel, load_lm
from fromage.models.prompts import embed_prompts, max_length
from fromage.models.vision.registry import load_vision

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
    return Fromage(lm, load_vision("toy"), k=2, q=16)


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
        score(model, prompt, ["star " * max_length(model)])
