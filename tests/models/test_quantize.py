"""Frozen layers in int8 and 4 bits."""

import pytest
import torch
from test_fast_step import make_batch, run
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from fromage.cli.eval_options import EvalOptions
from fromage.cli.models import load_any
from fromage.cli.talk import Opening
from fromage.config import FromageConfig
from fromage.data.tokenizer import PromptTokenizer
from fromage.errors import UserError
from fromage.evals.scores import identity
from fromage.models.fromage import Fromage
from fromage.models.frozen import TOY
from fromage.models.language_model import load_lm
from fromage.octopus import Octopus
from fromage.retrieval.open_index import open_index
from fromage.training.fast_step import fast_step
from fromage.training.reference_step import reference_step

pytest.importorskip("bitsandbytes")


class NoTower(torch.nn.Module):
    shape, width = (20,), 20


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """A small OPT on disk, in the layout of the real ones."""
    out = tmp_path_factory.mktemp("opt")
    tokenizer = PromptTokenizer(str(TOY / "opt"))
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=tokenizer.vocab_size, hidden_size=128, word_embed_proj_dim=128, ffn_dim=512,
                       num_hidden_layers=2, num_attention_heads=4, init_std=0.1)  # fmt: skip
    OPTForCausalLM(config).save_pretrained(out)
    AutoTokenizer.from_pretrained(TOY / "opt").save_pretrained(out)
    return out


def model_of(opt, **options):
    torch.manual_seed(0)
    return Fromage(load_lm(str(opt), **options), NoTower(), FromageConfig(q=16))


def block_bytes(model):
    return sum(p.nbytes for block in model.lm.blocks for p in block.parameters() if p.ndim == 2)


@pytest.mark.parametrize(("kind", "share", "alike"), [("int8", 1 / 4, 0.98), ("nf4", 1 / 8, 0.9)])
def test_they_take_less_memory_and_train_nearly_alike(opt, kind, share, alike):
    whole, small = model_of(opt), model_of(opt, quantize=kind)
    assert block_bytes(small) == pytest.approx(share * block_bytes(whole), rel=0.01)
    batch = make_batch(whole, [5, 12, 3, 24, 20, 7, 2, 9])
    _, want = run(fast_step, whole, batch, False)
    _, got = run(fast_step, small, batch, False)
    flat = [grads["visual_prefix.weight"].flatten() for grads in (got, want)]
    assert torch.cosine_similarity(*flat, dim=0) > alike


def test_fast_and_plain_steps_agree_on_four_bits(opt):
    model = model_of(opt, quantize="nf4")
    batch = make_batch(model, [5, 12, 3, 9])
    (slow, slow_grads), (fast, fast_grads) = run(reference_step, model, batch, True), run(fast_step, model, batch, True)
    torch.testing.assert_close(fast.loss, slow.loss, rtol=1e-5, atol=1e-5)
    for name, grad in slow_grads.items():
        assert (fast_grads[name] - grad).norm() < 1e-3 * grad.norm(), name


def test_random_weights_are_not_quantised(opt):
    with pytest.raises(UserError, match="needs weights"):
        load_lm(str(opt), random_weights=True, quantize="int8")


def test_a_missing_package_is_named(opt, monkeypatch):
    monkeypatch.setattr("fromage.models.language_model.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r"\.\[quant\]"):
        load_lm(str(opt), quantize="int8")


def test_commands_hold_the_layers_as_they_are_told(model, index, tmp_path):
    model.save_pretrained(tmp_path / "model", "float32")
    index.save(tmp_path / "index")
    how = {"ckpt": str(tmp_path / "model"), "device": "cpu", "quantize": "nf4"}
    opened = Opening(**how).open()[0], EvalOptions(**how).model(), load_any(**how)
    found, _ = open_index(tmp_path / "index", **how)
    for small in (*opened, found):
        assert block_bytes(small) == pytest.approx(block_bytes(model) / 8, rel=0.01)


def test_scores_of_a_quantised_model_are_not_taken_for_the_others(opt, monkeypatch):
    monkeypatch.setattr(Fromage, "fingerprint", lambda self: "the same")
    small, whole = (identity(model_of(opt, **how), [], {}) for how in ({"quantize": "nf4"}, {}))
    assert small == whole | {"quantized": "nf4", "language_model": small["language_model"]} != whole


def test_a_language_model_that_was_trained_itself_is_not_quantised(tmp_path):
    model = Octopus.load(num_queries=3, decoder_width=16, decoder_layers=1, heads=2)
    model.lm.hf.requires_grad_(True)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="trained itself, and would be held in int8; leave out quantize"):
        Octopus.from_pretrained(tmp_path / "model", quantize="int8")
