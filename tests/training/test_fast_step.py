"""The fast step against the reference: losses to 1e-6 relative, gradients of every trained parameter to 1e-4."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from fromage.config import FromageConfig
from fromage.data.batches import Batch, FurtherTexts
from fromage.data.tokenizer import PromptTokenizer, ret_tokens
from fromage.errors import UserError
from fromage.models.fromage import Fromage
from fromage.models.frozen import TOY
from fromage.models.language_model import LanguageModel
from fromage.training.fast_step import fast_step, retrieval_text
from fromage.training.losses import frozen_head_loss, positions_at_a_time
from fromage.training.meter import Meter
from fromage.training.reference_step import reference_step
from fromage.training.step import PAPER_WEIGHTS, LossWeights

M = 20  # width of the image features


class NoTower(nn.Module):
    """Stands where the vision tower does; the batches here bring their features."""

    shape, width = (M,), M


def build(kind, k, dtype=torch.float32, r=1, **options):
    torch.manual_seed(0)
    tokenizer = PromptTokenizer(str(TOY / "opt"), ret_tokens(r))
    rows = tokenizer.vocab_size + 7
    if kind == "tied":
        config = OPTConfig(
            vocab_size=rows,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            init_std=0.3,
            activation_function="gelu",  # ReLU's derivative jumps, where two exact steps may differ
        )
        hf = OPTForCausalLM(config)
    else:
        config = LlamaConfig(
            vocab_size=rows,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
        hf = LlamaForCausalLM(config)
    return Fromage(LanguageModel(hf.to(dtype), tokenizer, kind), NoTower(), FromageConfig(k=k, q=16, r=r, **options))


@pytest.fixture(scope="module")
def models():
    return {(kind, k): build(kind, k) for kind in ("tied", "untied") for k in (1, 4)}


def make_batch(model, lengths, seed=0):
    """Captions of random words; lengths count </s> and the first [RET]; 1 is [RET] alone, of an empty text without </s>."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer, r = model.tokenizer, model.r
    lengths = [n + r - 1 for n in lengths]
    ids = torch.full((len(lengths), max(lengths)), tokenizer.pad_id)
    for row, n in zip(ids, lengths, strict=True):
        words = torch.randint(4, tokenizer.vocab_size, (max(n - 1 - r, 0),), generator=generator).tolist()
        row[:n] = torch.tensor([2, *words, *tokenizer.ret_ids][-n:])
    features = torch.randn(len(lengths), M, generator=generator)
    return Batch([str(i) for i in range(len(lengths))], [""] * len(lengths), ids, lengths, None, features)


def run(step, model, batch, paired):
    model.zero_grad()
    out = step(model, batch, paired)
    out.loss.backward()
    return out, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.trained().items()}


def compare(model, batch, paired, step=fast_step, reference=reference_step):
    slow, slow_grads = run(reference, model, batch, paired)
    fast, fast_grads = run(step, model, batch, paired)
    # what rounding a cosine by 1e-6 changes in a logit of the contrastive loss
    logit = 1e-6 * model.logit_scale.exp().item()
    for name, atol in (("captioning_loss", 1e-6), ("text_loss", 1e-6), ("contrastive_loss", logit), ("loss", logit)):
        torch.testing.assert_close(getattr(fast, name), getattr(slow, name), rtol=1e-6, atol=atol, msg=name)
    for name, want in slow_grads.items():  # that of the scale is a sum of logits that may cancel to nearly nothing
        error, rounding = (fast_grads[name] - want).norm(), logit if name == "logit_scale" else 1e-10
        assert error < 1e-4 * want.norm() + rounding, f"{name}: {error:.1e} of {want.norm():.1e}"
    assert slow.caption_accuracy == pytest.approx(fast.caption_accuracy.item())


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_same_losses_and_gradients(models, kind, k, paired):
    model = models[kind, k]
    compare(model, make_batch(model, [5, 12, 3, 24, 24, 7, 2, 9]), paired)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=9).filter(lambda lengths: max(lengths) > 2),
    paired=st.booleans(),
    which=st.sampled_from([(kind, k) for kind in ("tied", "untied") for k in (1, 4)]),
    chunk=st.integers(0, 9),
    seed=st.integers(0, 999),
)
@example(lengths=[1, 1, 5, 1], paired=False, which=("untied", 1), chunk=2, seed=0)  # a chunk without a word
def test_any_lengths_batch_sizes_and_chunks(models, lengths, paired, which, chunk, seed):
    compare(models[which], make_batch(models[which], lengths, seed), paired, partial(fast_step, chunk=chunk))


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_retrieval_pass_of_weight_0_is_run_for_figures_alone(models, kind, chunk):
    """In training it is not run, and captioning has the gradients it always has; without gradients its figures are there."""
    model, weights = models[kind, 1], LossWeights(retrieval=0.0)
    batch = make_batch(model, [5, 12, 3, 24, 7, 2])
    fast = partial(fast_step, chunk=chunk, weights=weights)
    compare(model, batch, True, fast, partial(reference_step, weights=weights))
    out, grads = run(fast, model, batch, True)
    assert (out.text_loss, out.contrastive_loss, len(out.texts), len(out.images)) == (0, 0, 0, 0)
    whole, _ = run(reference_step, model, batch, True)
    torch.testing.assert_close(out.captioning_loss, whole.captioning_loss)
    assert grads["visual_prefix.weight"].norm() > 0 and not grads["text_head.weight"].any()
    with torch.no_grad():
        shown = fast(model, batch, True)
    torch.testing.assert_close(shown.contrastive_loss, whole.contrastive_loss.detach())
    torch.testing.assert_close(shown.texts, whole.texts.detach(), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def first():
    """Models whose start token stands in front of the image."""
    return {(kind, k): build(kind, k, start="first") for kind in ("tied", "untied") for k in (1, 4)}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(2, 24), min_size=1, max_size=9).filter(lambda lengths: max(lengths) > 2),
    paired=st.booleans(),
    which=st.sampled_from([(kind, k) for kind in ("tied", "untied") for k in (1, 4)]),
    chunk=st.integers(0, 9),
    seed=st.integers(0, 999),
)
@example(lengths=[2, 2, 5, 2], paired=True, which=("untied", 1), chunk=2, seed=0)  # captions and a chunk without a word
def test_a_start_token_in_front_has_the_gradients_of_the_reference(first, lengths, paired, which, chunk, seed):
    compare(first[which], make_batch(first[which], lengths, seed), paired, partial(fast_step, chunk=chunk))


@pytest.mark.parametrize("paired", [False, True])
def test_a_start_token_in_front_is_read_once_and_is_no_target(first, paired, monkeypatch):
    """The sequences are </s> image caption, or </s> image caption image caption."""
    model, read = first["untied", 4], []
    batch = make_batch(model, [5, 12, 3, 8])
    embed = model.lm.embed
    monkeypatch.setattr(model.lm, "embed", lambda ids: read.append(ids[0].tolist()) or embed(ids))
    want = []
    for i, (row, n) in enumerate(zip(batch.ids.tolist(), batch.lengths, strict=True)):
        places = [model.tokenizer.image_id] * 4
        want += [*row[: not (paired and i % 2)], *places, *row[1 : n - 1]]
    targets = []
    monkeypatch.setattr(
        "fromage.training.fast_step.frozen_head_loss",
        lambda hidden, ids, lm: targets.append(ids.tolist()) or frozen_head_loss(hidden, ids, lm),
    )
    fast_step(model, batch, paired)
    assert read[0] == want
    assert targets == [[i for row, n in zip(batch.ids.tolist(), batch.lengths, strict=True) for i in row[1 : n - 1]]]


RETS = [(kind, r, sees) for kind in ("tied", "untied") for r in (1, 4, 8) for sees in ("sequential", "stacked")]


@pytest.fixture(scope="module")
def several():
    """Models of r [RET] tokens, by whether they are tied, r and what the tokens see."""
    return {(kind, r, sees): build(kind, 2, r=r, ret_attention=sees, ret_fusion="transformer") for kind, r, sees in RETS}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=7).filter(lambda lengths: max(lengths) > 2),
    paired=st.booleans(),
    which=st.sampled_from(RETS),
    chunk=st.integers(0, 5),
    seed=st.integers(0, 999),
)
@example(lengths=[1, 1, 5, 1], paired=False, which=("untied", 8, "stacked"), chunk=2, seed=0)
@example(lengths=[5, 12, 3, 24, 2], paired=True, which=("tied", 8, "sequential"), chunk=0, seed=0)
def test_several_ret_tokens_have_the_gradients_of_the_reference(several, lengths, paired, which, chunk, seed):
    compare(several[which], make_batch(several[which], lengths, seed), paired, partial(fast_step, chunk=chunk))


@pytest.mark.parametrize("fusion", ["mean", "first"])
@pytest.mark.parametrize("sees", ["sequential", "stacked"])
def test_each_fusion_of_several_ret_tokens(sees, fusion):
    model = build("tied", 1, r=4, ret_attention=sees, ret_fusion=fusion)
    compare(model, make_batch(model, [5, 12, 3, 24, 7]), True)
    used = run(fast_step, model, make_batch(model, [5, 12, 3]), False)[1]["ret.input"].norm(dim=1) > 0
    assert used.tolist() == ([True] * 4 if fusion == "mean" else [True, False, False, False])


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_sequential_ret_tokens_see_their_predecessors_and_stacked_ones_do_not(kind):
    for sees in ("sequential", "stacked"):
        model = build(kind, 1, r=3, ret_attention=sees)
        batch, states = make_batch(model, [5, 12, 3]), []
        for _ in range(2):
            states.append(fast_step_states(model, batch))
            torch.testing.assert_close(states[-1], model.hidden_of_texts(batch.ids, batch.lengths)[1], atol=1e-5, rtol=1e-4)
            with torch.no_grad():
                model.ret.input[0].mul_(-1)  # the first [RET]
        changed = (states[0] - states[1]).abs().amax((0, 2)) > 1e-4
        assert changed.tolist() == [True, sees == "sequential", sees == "sequential"]
        with torch.no_grad():
            model.ret.input[:2] = model.ret.input[:2].flip(0)
        swapped = fast_step_states(model, batch)[:, 0]
        assert torch.allclose(swapped, states[0][:, 1], atol=1e-4) is (sees == "stacked")


def fast_step_states(model, batch):
    with torch.no_grad():
        return retrieval_text(model, batch)[1]


def test_of_several_ret_tokens_the_first_alone_is_a_target():
    model = build("untied", 1, r=4)
    batch = make_batch(model, [5, 12, 3])
    hidden, _ = model.hidden_of_texts(batch.ids, batch.lengths)
    logits = model.lm.logits(hidden)
    assert logits.shape[-1] == model.tokenizer.ret_ids[-1] + 1 and logits[..., model.tokenizer.ret_ids[1:]].isneginf().all()
    assert model.ret.output.shape == (1, 32) and model.ret.input.shape == (4, 32)
    # </s> y_1 ... y_n predict y_1 ... y_n [RET]
    wanted = [-logits[i, t].log_softmax(-1)[batch.ids[i, t + 1]] for i, n in enumerate(batch.lengths) for t in range(n - 4)]
    for step in (reference_step, fast_step):
        torch.testing.assert_close(step(model, batch, False).text_loss, torch.stack(wanted).mean())


@pytest.mark.parametrize("chunk", [0, 2])
def test_an_image_that_is_no_negative_of_its_other_caption(models, chunk):
    model, apart = models["tied", 1], LossWeights(same_image_negatives=False)
    batch = make_batch(model, [5, 12, 3, 24, 7])
    batch = batch._replace(features=batch.features[[0, 1, 0, 3, 1]])
    steps = partial(fast_step, chunk=chunk, weights=apart), partial(reference_step, weights=apart)
    compare(model, batch, False, *steps)
    assert steps[1](model, batch, False).contrastive_loss < reference_step(model, batch, False).contrastive_loss


@pytest.mark.parametrize("chunk", [0, 2])
def test_dropout_of_image_features_is_the_retrieval_passs_alone(models, chunk):
    model, batch = models["untied", 4], make_batch(models["untied", 4], [5, 12, 3, 24])
    dropout = (torch.arange(batch.features.numel()).view_as(batch.features) % 3 > 0) * 1.5  # a third is left out
    steps = partial(fast_step, chunk=chunk, dropout=dropout), partial(reference_step, dropout=dropout)
    compare(model, batch, True, *steps)
    out, plain = steps[0](model, batch, True), fast_step(model, batch, True)
    torch.testing.assert_close(out.images, model.embed_images(batch.features * dropout))
    torch.testing.assert_close(out.captioning_loss, plain.captioning_loss)
    assert (out.contrastive_loss - plain.contrastive_loss).abs() > 1e-3


@pytest.mark.parametrize("chunk", [0, 2])
def test_other_captions_of_a_batch_change_no_loss_and_no_gradient(models, chunk):
    model, step = models["untied", 4], partial(fast_step, chunk=chunk)
    batch = make_batch(model, [5, 12, 3, 24])
    more = FurtherTexts(["x"] * 2, batch.ids[:2], batch.lengths[:2], [0, 3])
    (a, plain), (b, grads) = run(step, model, batch, True), run(step, model, batch._replace(more=more), True)
    assert torch.equal(a.loss, b.loss) and all(torch.equal(grads[name], value) for name, value in plain.items())


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("which", [("tied", 4), ("untied", 1)])
def test_requests_are_read_by_retrieval_alone(models, which, paired, chunk):
    model, fast = models[which], partial(fast_step, chunk=chunk)
    batch, other = make_batch(model, [5, 12, 3, 24, 7]), make_batch(model, [9, 12, 14, 24, 2], seed=1)
    asking = batch._replace(requests=FurtherTexts([""] * 5, other.ids, other.lengths, list(range(5))))
    compare(model, asking, paired, fast)
    both, captions = fast(model, asking, paired), fast(model, batch, paired)
    requests = fast(model, other._replace(features=batch.features), paired)
    torch.testing.assert_close(both.captioning_loss, captions.captioning_loss)
    for name in ("text_loss", "contrastive_loss", "texts"):
        torch.testing.assert_close(getattr(both, name), getattr(requests, name))
    assert both.text_loss != captions.text_loss


@pytest.mark.parametrize("weights", [LossWeights(0, 1), LossWeights(1, 0), LossWeights(0.5, 2)])
def test_either_pass_may_weigh_less_or_nothing(models, weights):
    model, lengths = models["untied", 4], [5, 12, 3, 24]
    plain = partial(reference_step, weights=weights)
    compare(model, make_batch(model, lengths), True, partial(fast_step, weights=weights, chunk=2), plain)
    out = plain(model, make_batch(model, lengths), True)
    want = weights.captioning * out.captioning_loss + weights.retrieval * (out.text_loss + out.contrastive_loss)
    assert torch.equal(out.loss, want) and (out.captioning_loss == 0) == (weights.captioning == 0)


@pytest.mark.parametrize("chunk", [0, 2, 4])
@pytest.mark.parametrize("paired", [False, True])
def test_captioning_may_read_a_share_of_the_examples(models, paired, chunk):
    model, some = models["untied", 4], LossWeights(captioned_share=0.5)
    batch = make_batch(model, [5, 12, 3, 24, 9, 7, 2])  # half of 7 examples is 4, two pairs
    compare(model, batch, paired, partial(fast_step, weights=some, chunk=chunk), partial(reference_step, weights=some))
    out, whole, first = (
        fast_step(model, b, paired, w) for b, w in ((batch, some), (batch, PAPER_WEIGHTS), (batch.part(0, 4), PAPER_WEIGHTS))
    )
    torch.testing.assert_close(out.captioning_loss, first.captioning_loss)
    torch.testing.assert_close(out.contrastive_loss, whole.contrastive_loss)
    assert out.captioning_loss != whole.captioning_loss


def test_a_share_of_the_examples_has_a_word(models):
    batch = make_batch(models["untied", 1], [1, 1, 1, 6, 1, 9])
    assert [LossWeights(captioned_share=share).captioned(models["untied", 1], batch) for share in (0, 0.5, 0.7, 1)] == [
        4,
        4,
        4,
        6,
    ]


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_texts_read_at_their_last_word(kind):
    model = build(kind, 1, pooling="last")
    compare(model, make_batch(model, [5, 12, 3, 2, 24]), True)
    words = make_batch(model, [5, 12, 3]).ids
    other = words.clone()
    other[words == model.tokenizer.ret_id] = 7  # not looked at
    for ids in (words, other):
        torch.testing.assert_close(model.hidden_of_texts(ids, [5, 12, 3])[1], model.hidden_of_texts(words, [5, 12, 3])[1])


def test_padding_beyond_the_longest_changes_nothing(models):
    model = models["tied", 1]
    batch = make_batch(model, [5, 12, 3])
    wide = batch._replace(ids=nn.functional.pad(batch.ids, (0, 12), value=model.tokenizer.pad_id))
    torch.testing.assert_close(fast_step(model, wide, True).loss, fast_step(model, batch, True).loss)


@pytest.mark.parametrize("most", [1, 7])
def test_chunks_do_not_matter(models, monkeypatch, most):
    model = models["tied", 1]
    batch = make_batch(model, [5, 12, 3, 20])
    seen, real = [], model.lm.frozen_logits
    monkeypatch.setattr(model.lm, "frozen_logits", lambda hidden: seen.append(len(hidden)) or real(hidden))
    whole, grads = run(fast_step, model, batch, False)
    assert len(seen) == 2 and min(seen) > 7, "the logits of each pass at once"
    monkeypatch.setattr("fromage.training.losses.CPU_CHUNK", most)
    parts, part_grads = run(fast_step, model, batch, False)
    assert max(seen[2:]) <= most and sum(seen[2:]) == sum(seen[:2])
    torch.testing.assert_close(parts.loss, whole.loss)
    for name in grads:
        torch.testing.assert_close(part_grads[name], grads[name])


@pytest.mark.parametrize(("count", "size"), [(0, 1), (1, 1), (512, 512), (513, 257), (1024, 512), (1025, 342)])
def test_logits_exist_in_as_few_parts_as_may_be_of_one_size(count, size):
    assert positions_at_a_time(count, on_host=True) == size
    assert positions_at_a_time(count) <= 1024


def test_in_bfloat16_it_is_no_further_from_float32_than_the_reference_step():
    """Both run the same frozen weights in bfloat16, 8 bits of mantissa, and are compared to the reference step in float32.

    Rounding differs between the two, so the fast step may be off by as much again: factor 1.5.
    """
    model = build("tied", 1, torch.bfloat16)
    exact = copy.deepcopy(model)
    exact.lm.hf.float()
    batch = make_batch(model, [5, 12, 3, 24, 24, 7, 2, 9] * 2)
    _, want = run(reference_step, exact, batch, True)
    errors = {}
    for step in (reference_step, fast_step):
        _, got = run(step, model, batch, True)
        errors[step] = [((got[n] - want[n]).norm() / want[n].norm()).item() for n in want]
    assert sum(errors[fast_step]) <= 1.5 * sum(errors[reference_step])


def test_without_gradient_it_gives_the_same_losses(models):
    model = models["untied", 4]
    batch = make_batch(model, [5, 12, 3])
    with torch.no_grad():
        torch.testing.assert_close(fast_step(model, batch, True).loss, reference_step(model, batch, True).loss)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_a_batch_in_chunks_has_the_gradients_of_the_whole(models, chunk, paired):
    model = models["tied", 4]
    compare(model, make_batch(model, [5, 12, 3, 24, 24, 7, 2, 9]), paired, partial(fast_step, chunk=chunk))


def test_chunks_hold_the_activations_of_one_at_a_time(models):
    model = models["tied", 1]
    batch = make_batch(model, [24] * 32)
    peaks = {}
    for chunk in (0, 4):
        meter = Meter([*model.parameters(), *model.buffers(), batch.ids, batch.features])
        loss = meter.run("forward", lambda chunk=chunk: fast_step(model, batch, False, chunk=chunk).loss)
        meter.run("backward", loss.backward)
        peaks[chunk] = max(p.peak for p in meter.passes.values())
    assert peaks[4] < 0.5 * peaks[0]


@pytest.mark.parametrize("step", [reference_step, fast_step])
def test_a_batch_without_a_word_is_refused_by_its_keys(models, step):
    with pytest.raises(UserError, match=r"no caption of this batch has a word.*0, 1"):
        step(models["tied", 1], make_batch(models["tied", 1], [2, 2]), False)
