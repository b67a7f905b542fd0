"""Composition losses: the fast step against the reference, what they reach, and queries read as they were trained."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_fast_step import M, build
from torch import nn

from fromage.data.sample_images import Images
from fromage.data.tuples import TupleBatch
from fromage.errors import UserError
from fromage.models.prompts import RET, Starts, embed_prompts
from fromage.training.fast_composition import fast_composition
from fromage.training.reference_composition import reference_composition
from fromage.training.step import LossWeights

Q = 16
BOTH = LossWeights(composition_captioning=1.0, composition_retrieval=1.0)
KINDS = [(kind, r, sees) for kind in ("tied", "untied") for r in (1, 4, 8) for sees in ("sequential", "stacked")]


class TextTower:
    """An embedding of its own for each text."""

    def embed_text(self, texts):
        rows = [torch.randn(Q, generator=torch.Generator().manual_seed(int(text))) for text in texts]
        return nn.functional.normalize(torch.stack(rows), dim=-1)


@pytest.fixture(scope="module")
def models():
    made = {(kind, r, sees): build(kind, 2, r=r, ret_attention=sees, ret_fusion="transformer") for kind, r, sees in KINDS}
    last = build("tied", 1, pooling="last")
    clip = build("tied", 1, r=4, ret_attention="stacked")
    clip.config = replace(clip.config, space="clip")
    clip.image_head.requires_grad_(False)
    first = build("untied", 2, r=4, ret_attention="stacked", start="first")
    return made | {"last": last, "clip": clip, "first": first}


def make_tuples(model, lengths, seed=0, shown=None):
    """Tuples of random words. lengths: of a condition, </s> and all [RET] left out, and of a target caption."""
    draw = torch.Generator().manual_seed(seed)
    tokenizer, words, said = model.tokenizer, [n for n, _ in lengths], [n for _, n in lengths]
    some = lambda n: torch.randint(4, tokenizer.vocab_size, (n,), generator=draw)  # noqa: E731
    conditions = torch.full((len(lengths), max(words) + 1 + model.r), tokenizer.pad_id)
    captions = torch.full((len(lengths), max(said)), tokenizer.pad_id)
    for row, caption, (m, n) in zip(conditions, captions, lengths, strict=True):
        row[: m + 1 + model.r] = torch.tensor([2, *some(m).tolist(), *tokenizer.ret_ids])
        caption[:n] = some(n)
    rows = list(range(len(lengths))) if shown is None else shown
    images = Images(None, torch.randn(len(rows), M, generator=draw)) if rows else None
    keys = [str(i) for i in range(len(lengths))]
    features = torch.randn(len(lengths), M, generator=draw)
    return TupleBatch(keys, keys, conditions, [m + 1 + model.r for m in words], captions, said, None, features, rows, images)


def run(step, model, tuples, weights, tower=None):
    model.zero_grad()
    out = step(model, tuples, weights, tower)
    if out.loss.requires_grad:
        out.loss.backward()
    return out, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.trained().items()}


def compare(model, tuples, weights=BOTH, tower=None, chunk=0):
    slow, slow_grads = run(reference_composition, model, tuples, weights, tower)
    fast, fast_grads = run(partial(fast_composition, chunk=chunk), model, tuples, weights, tower)
    logit = 1e-6 * model.logit_scale.exp().item()  # what rounding a cosine by 1e-6 changes in a logit
    for name, atol in (("captioning_loss", 1e-6), ("contrastive_loss", logit), ("loss", logit)):
        torch.testing.assert_close(getattr(fast, name), getattr(slow, name), rtol=1e-6, atol=atol, msg=name)
    for name, want in slow_grads.items():
        error = (fast_grads[name] - want).norm() / want.norm().clamp_min(1e-6)
        assert error < 1e-4, f"{name}: {error:.1e}"
    assert slow.caption_accuracy == pytest.approx(fast.caption_accuracy.item())
    assert slow.retrieval_accuracy == pytest.approx(fast.retrieval_accuracy.item())
    return fast, fast_grads


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6),
    which=st.sampled_from([*KINDS, "last", "first"]),
    weights=st.sampled_from([(1, 1), (0, 1), (1, 0), (0.5, 2)]),
    chunk=st.integers(0, 4),
    seed=st.integers(0, 999),
)
@example(lengths=[(3, 1), (9, 1), (1, 1)], which=("tied", 4, "stacked"), weights=(1, 1), chunk=2, seed=0)
@example(lengths=[(5, 9), (2, 1)], which="first", weights=(1, 1), chunk=0, seed=0)
@example(lengths=[(5, 9), (2, 1), (7, 4), (1, 12)], which=("untied", 4, "sequential"), weights=(0.5, 2), chunk=0, seed=0)
@example(lengths=[(5, 9), (2, 1), (7, 4), (1, 12)], which=("tied", 1, "sequential"), weights=(1, 1), chunk=3, seed=0)
def test_same_losses_and_gradients(models, lengths, which, weights, chunk, seed):
    model, both = models[which], LossWeights(composition_captioning=weights[0], composition_retrieval=weights[1])
    compare(model, make_tuples(model, lengths, seed), both, chunk=chunk)


LENGTHS = [(5, 9), (2, 1), (7, 4), (1, 12)]


@pytest.mark.parametrize("chunk", [0, 3])
def test_target_captions_stand_for_target_images_that_are_missing(models, chunk):
    model = models["clip"]
    out, grads = compare(model, make_tuples(model, LENGTHS, shown=[2]), tower=TextTower(), chunk=chunk)
    assert grads["image_head.weight"].norm() == 0 and grads["visual_prefix.weight"].norm() > 0
    without, _ = compare(model, make_tuples(model, LENGTHS, shown=[]), tower=TextTower(), chunk=chunk)
    assert out.contrastive_loss != without.contrastive_loss


@pytest.mark.parametrize("step", [reference_composition, fast_composition])
def test_a_tuple_without_target_image_needs_the_space_of_clip(models, step):
    model = models["tied", 1, "sequential"]
    with pytest.raises(UserError, match=r"^0, 3: no target image.*model.space clip"):
        step(model, make_tuples(model, LENGTHS, shown=[1, 2]), BOTH, TextTower())


@pytest.mark.parametrize("step", [reference_composition, fast_composition])
@pytest.mark.parametrize(("weights", "rows"), [((1, 0), 1), ((0, 1), 1), ((1, 1), 2)])
def test_a_loss_of_weight_0_runs_no_pass(models, step, weights, rows, monkeypatch):
    model, ran = models["tied", 4, "stacked"], []
    for name in ("packed", "forward"):
        run_it = getattr(model.lm, name)
        monkeypatch.setattr(model.lm, name, lambda *args, run_it=run_it: ran.append(1) or run_it(*args))
    used = LossWeights(composition_captioning=weights[0], composition_retrieval=weights[1])
    step(model, make_tuples(model, LENGTHS), used)
    assert len(ran) == (rows if step is reference_composition else min(rows, 1))


def test_every_trained_parameter_is_reached(models):
    for which in KINDS:
        grads = run(fast_composition, models[which], make_tuples(models[which], LENGTHS), BOTH)[1]
        assert all(grad.norm() > 0 for grad in grads.values()), which


@pytest.mark.parametrize("which", [("untied", 4, "sequential"), ("tied", 4, "stacked"), "last", "first"])
def test_a_query_is_read_as_it_was_trained(models, which, monkeypatch):
    """The prompt of an image and a text has the states of the retrieval pass."""
    model, seen = models[which], []
    tuples = make_tuples(model, [(4, 3)])
    embed = model.embed_ret
    monkeypatch.setattr(model, "embed_ret", lambda hidden: seen.append(hidden.detach()) or embed(hidden))
    fast_composition(model, tuples, BOTH)
    ids = tuples.conditions[0, 1:5].tolist()
    monkeypatch.setattr(model.tokenizer, "encode", lambda text: ids)
    parts = [tuples.features[0], "but at night", *([RET] if model.config.pooling == "ret" else [])]
    batch = embed_prompts(model, [parts], starts=Starts.ONCE)
    hidden = model.lm(batch.embeds, batch.mask, model.positions(batch.ids, batch.mask))
    torch.testing.assert_close(seen[0], hidden[:, -model.r :].detach(), atol=1e-5, rtol=1e-4)


def test_equal_targets_are_no_negatives_where_that_is_asked_for(models):
    model = models["tied", 1, "sequential"]
    tuples = make_tuples(model, LENGTHS)
    same = tuples._replace(target_images=Images(None, tuples.target_images.features[[0, 1, 0, 1]]))
    apart = LossWeights(same_image_negatives=False, composition_retrieval=1.0)
    assert compare(model, same, apart)[0].contrastive_loss < compare(model, same)[0].contrastive_loss
