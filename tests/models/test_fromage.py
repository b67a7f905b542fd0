from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fromage.config import FromageConfig, kinds
from fromage.errors import UserError
from fromage.models import fromage
from fromage.models.base import fill
from fromage.models.fromage import Fromage
from fromage.models.pretrained import from_saved, to_saved
from fromage.training.reference_step import captioning_ids, reference_step


def test_trained_parameters_are_the_papers(toy_model):
    m, d, k, q = toy_model.vision.width, toy_model.lm.width, 2, 32
    shapes = {name: tuple(p.shape) for name, p in toy_model.trained().items()}
    assert shapes == {
        "visual_prefix.weight": (d * k, m), "visual_prefix.bias": (d * k,),
        "text_head.weight": (q, d), "text_head.bias": (q,), "image_head.weight": (q, m), "image_head.bias": (q,),
        "ret.input": (1, d), "logit_scale": (),
    }  # fmt: skip
    assert {name for name, p in toy_model.named_parameters() if p.requires_grad} == set(shapes)


def test_full_size_trains_5513729_parameters():
    m, d, k, q = 1024, 4096, 1, 256
    heads = torch.nn.Linear(m, d * k), torch.nn.Linear(d, q), torch.nn.Linear(m, q)
    assert sum(p.numel() for head in heads for p in head.parameters()) + d + 1 == 5_513_729


def test_interleaved_ids_embed_as_a_concatenation_by_hand(toy_model):
    tokenizer, lm = toy_model.tokenizer, toy_model.lm
    features = torch.randn(3, toy_model.vision.width)
    prefix = toy_model.visual_prefix(features)
    image = [tokenizer.image_id] * 2
    one, two = tokenizer.encode("a red star"), tokenizer.encode("at night")
    ids = torch.tensor([[2, *one, *image, *two, *image], [2, *image, *one, *two, 1, 1]])
    table = lm.hf.get_input_embeddings().frozen
    words = [table(torch.tensor(w)) for w in (one, two)]
    first = torch.cat([table(torch.tensor([2])), words[0], prefix[0], words[1], prefix[1]])
    second = torch.cat([table(torch.tensor([2])), prefix[2], words[0], words[1], table(torch.tensor([1, 1]))])
    assert torch.equal(toy_model.embed(ids, prefix), torch.stack([first, second]))
    weight, bias = toy_model.visual_prefix.weight, toy_model.visual_prefix.bias
    torch.testing.assert_close(prefix[1].flatten(), weight @ features[1] + bias)


@pytest.mark.parametrize("paired", [False, True])
def test_captioning_ids_hold_each_example_once(toy_model, batch, paired):
    ids, mask = captioning_ids(toy_model, batch, paired)
    image, ret = toy_model.tokenizer.image_id, toy_model.tokenizer.ret_id
    kept = [row[m].tolist() for row, m in zip(ids, mask, strict=True)]
    want = [[image, image, *row[: n - 1].tolist()] for row, n in zip(batch.ids, batch.lengths, strict=True)]
    if paired:
        want = [want[i] + (want[i + 1] if i + 1 < len(want) else []) for i in range(0, len(want), 2)]
    assert kept == want and ret not in ids


@pytest.mark.parametrize("paired", [False, True])
def test_plain_step_is_the_paper_sequence_by_sequence(toy_model, batch, paired):
    """Each sequence run alone, without padding, and each loss written out."""
    lm, tokenizer, n = toy_model.lm, toy_model.tokenizer, len(batch.keys)
    features = toy_model.vision(batch.pixels)
    prefix = toy_model.visual_prefix(features)
    captions = [row[:length].tolist() for row, length in zip(batch.ids, batch.lengths, strict=True)]

    def run(embeds):
        return lm(embeds[None], torch.ones(1, len(embeds), dtype=torch.bool))[0]

    def nll(hidden, positions, targets):
        return F.cross_entropy(lm.logits(hidden)[positions], torch.tensor(targets), reduction="none")

    losses, group = [], 2 if paired else 1
    for i in range(0, n, group):
        parts, positions, targets, at = [], [], [], 0
        for j in range(i, min(i + group, n)):
            words = captions[j][:-1]  # without [RET]
            parts += [prefix[j], lm.embed(torch.tensor([words]))[0]]
            positions += range(at + 1, at + 1 + len(words))  # the last image place says </s>, </s> says y_1, ...
            targets += words
            at += 2 + len(words)
        losses.append(nll(run(torch.cat(parts)), positions, targets))
    texts, rets = [], []
    for ids in captions:
        hidden = run(lm.embed(torch.tensor([ids]))[0])
        texts.append(nll(hidden, list(range(len(ids) - 1)), ids[1:]))
        rets.append(hidden[-1])
    t = F.normalize(toy_model.text_head(torch.stack(rets)), dim=1)
    v = F.normalize(toy_model.image_head(features), dim=1)
    logits = toy_model.logit_scale.exp() * v @ t.T
    target = torch.arange(n)

    out = reference_step(toy_model, batch, paired)
    torch.testing.assert_close(out.captioning_loss, torch.cat(losses).mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.text_loss, torch.cat(texts).mean(), rtol=1e-5, atol=1e-5)
    contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(out.contrastive_loss, contrastive, rtol=1e-5, atol=1e-5)
    assert tokenizer.ret_id == captions[0][-1]


@pytest.mark.parametrize(("pooling", "r", "offsets"), [("ret", 1, [0]), ("ret", 3, [0, 1, 2]), ("last", 1, [-1])])
def test_the_states_that_embed_texts_are_those_behind_the_ends_or_one_before(pooling, r, offsets):
    model = Fromage.load(k=1, q=4, r=r, pooling=pooling)
    hidden, ends = torch.randn(3, 9, 5), [4, 1, 6]
    want = torch.stack([hidden[row, [end + i for i in offsets]] for row, end in enumerate(ends)])  # (B, r, d)
    assert torch.equal(model.text_states(hidden, torch.tensor(ends)), want)
    packed = [9 * row + end for row, end in enumerate(ends)]
    assert torch.equal(model.text_states(hidden.flatten(0, 1), torch.tensor(packed)), want)
    assert model.pools_last_word == (pooling == "last")


def test_every_trained_parameter_gets_a_gradient_and_no_other(toy_model, batch):
    reference_step(toy_model, batch, True).loss.backward()
    have = {name for name, p in toy_model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert have == set(toy_model.trained())


def test_text_embeddings_do_not_depend_on_the_batch(toy_model):
    texts = ["a red star.", "a small blue ring on the left and a big green square at the top, on the sea at night."]
    both = toy_model.embed_text(texts)
    alone = torch.cat([toy_model.embed_text([text]) for text in texts])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both.norm(dim=1), torch.ones(2))


def test_text_too_long_for_the_language_model_is_an_error(toy_model):
    with pytest.raises(UserError, match="shorten"):
        toy_model.embed_text(["a red star", "a red star " * 600])


def test_fingerprint_follows_the_trained_parameters():
    torch.manual_seed(0)
    model = Fromage.load(q=8)
    before = model.fingerprint()
    assert before == model.fingerprint()
    with torch.no_grad():
        model.logit_scale.add_(0.1)
    assert model.fingerprint() != before


def test_every_option_is_on_record(toy_model):
    assert kinds(FromageConfig).keys() - to_saved(toy_model).settings.keys() == {"random_weights"}


def test_a_model_that_was_trained_quantised_can_be_loaded_otherwise(toy_model, monkeypatch):
    held = []
    load = lambda name, dtype, random_weights, quantize, rows: held.append(quantize) or toy_model.lm  # noqa: E731
    monkeypatch.setattr(fromage, "load_lm", load)
    saved = to_saved(toy_model)
    saved = replace(saved, settings=saved.settings | {"quantize": "int8"})
    for given in (None, "none", "nf4"):
        from_saved(Fromage, saved, quantize=given)
    assert held == ["int8", None, "nf4"]


def test_an_unknown_pooling_is_refused():
    with pytest.raises(UserError, match="pooling mean: must be ret or last"):
        Fromage.load(pooling="mean")


@pytest.mark.parametrize("places", [[[0, 1, 0], [1, 1, 0]], [[0, 0, 0], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]]])
def test_rows_take_their_places_in_order_and_both_have_gradients(places):
    places = torch.tensor(places, dtype=torch.bool)
    made = []
    for how in (fill, lambda e, p, r: e.masked_scatter(p.unsqueeze(-1), r)):
        torch.manual_seed(0)
        embeds, rows = torch.randn(2, 3, 4, requires_grad=True), torch.randn(int(places.sum()), 1, 4, requires_grad=True)
        out = how(embeds, places, rows)
        (out * torch.arange(24.0).view(2, 3, 4)).sum().backward()
        made.append((out, embeds.grad, rows.grad))
    for ours, theirs in zip(*made, strict=True):
        assert torch.equal(ours, theirs)
