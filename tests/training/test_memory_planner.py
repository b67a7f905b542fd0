"""The plan against published counts, against what autograd keeps in a real step, and against a GPU's allocator."""

import inspect
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, OPTConfig, OPTForCausalLM

from fromage.cli.main import main
from fromage.data.batches import Batch
from fromage.data.datamodule import CC3M
from fromage.errors import UserError
from fromage.models.vision.registry import plan_vision
from fromage.training import memory_planner
from fromage.training.configs import find_config
from fromage.training.fast_composition import fast_composition
from fromage.training.fast_step import captioning, fast_step
from fromage.training.layers import checkpoint_blocks
from fromage.training.memory_planner import Run, _model, _tuples, caption_lengths, count, read_run
from fromage.training.meter import Meter, attention_in_parts
from fromage.training.module import FromageModule
from fromage.training.plan import LM
from fromage.training.plan_report import as_json
from fromage.training.published_sizes import OPT, lm_config

GIB = 2**30
plan = cache(memory_planner.plan)  # of one run, several tests ask


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run with an OPT of 4 layers, 128 wide, by its configuration."""
    folder = tmp_path_factory.mktemp("opt")
    opt(folder, layers=4, width=128, vocabulary=500)
    return Run(lm=str(folder), vision="toy", dtype="float32", batch_size=8, max_tokens=20, tokens=11, stored_features=True)


def opt(folder, layers, width, vocabulary):
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        architectures=["OPTForCausalLM"],
    )
    config.save_pretrained(folder)


def real(run, device="cpu", lengths=None):
    """The model with storage, and a batch; the weights are whatever memory held."""
    lengths = lengths or caption_lengths(run)
    model = _model(run, plan_vision(run.vision, run.dtype)).to(device)
    ids = torch.randint(3, 400, (len(lengths), max(lengths)))
    for row, n in zip(ids, lengths, strict=True):
        row[n - 1] = model.tokenizer.ret_id
    shape = (len(ids), 3, *model.vision.image_size)
    pixels = None if run.stored_features else torch.randint(256, shape, dtype=torch.uint8, device=device)
    features = torch.randn(len(ids), model.vision.width, device=device) if run.stored_features else None
    return model, Batch([], [], ids.to(device), lengths, pixels, features)


def kept_bytes(model, call):
    """Bytes of the storages that autograd saves during a call, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    del out
    return sum(saved.values())


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize(
    ("options", "gflop", "tolerance"),
    [({}, 740, 0.02), ({"stored_features": True}, 580, 0.02), ({"step": "reference"}, 1640, 0.02)],
)
def test_the_paper_configuration_is_counted_without_its_weights(options, gflop, tolerance):
    before = resident()
    counted = plan(read_run(find_config("cc3m.yaml"), **options))
    assert resident() - before < 0.3 * GIB  # the weights alone are 13
    assert counted.trained == 5_513_729
    assert counted.parameters[LM] == 6_658_473_984
    assert counted.flop / 180 / 1e9 == pytest.approx(gflop, rel=tolerance)  # counted by hand: 13 GFLOP a token and pass
    assert sum(counted.peak.values()) < 48 * GIB


def test_a_frozen_temperature_is_not_counted_as_trained(small, tmp_path):
    (tmp_path / "a.yaml").write_text("model: {lm: toy, vision: toy, dtype: float32, freeze_temperature: true}")
    frozen = plan(replace(read_run(str(tmp_path / "a.yaml")), batch_size=small.batch_size))
    free = plan(replace(frozen.run, freeze_temperature=False))
    assert frozen.trained == free.trained - 1 and frozen.parameters == free.parameters
    assert free.peak["their Adam moments"] - frozen.peak["their Adam moments"] == 8
    assert as_json(frozen, 1, 1)["trained"] == frozen.trained


@pytest.mark.parametrize(
    ("options", "untrained", "without"),
    [
        ({"captioning_weight": 0.0}, ["visual_prefix"], {"captioning"}),
        (
            {"retrieval_weight": 0.0},
            ["text_head", "image_head", "logit_scale"],
            {"the text pass", "the contrastive loss"},
        ),
        ({"pooling": "last"}, [], set()),
    ],
)
@pytest.mark.parametrize("step", ["fast", "reference"])
def test_what_a_run_does_not_train_is_not_planned(small, options, untrained, without, step):
    counted, whole = plan(replace(small, step=step, **options)), plan(replace(small, step=step))
    parameters = real(small)[0].trained()
    held = sum(p.numel() for name, p in parameters.items() if name.split(".")[0] in untrained)
    assert counted.trained == whole.trained - held and counted.parameters == whole.parameters
    if step == "fast":
        assert set(whole.passes) - set(counted.passes) == without
    if (step, options) == ("reference", {"pooling": "last"}):  # it runs all of the text, with [RET] after it
        assert counted.flop == whole.flop
    else:
        assert counted.flop < whole.flop


def test_the_image_head_of_clips_space_is_not_counted_as_trained(small):
    learned, clip = (plan(replace(small, q=128, space=space)) for space in ("learned", "clip"))
    head = 128 * plan_vision("toy", "float32").width + 128
    assert learned.trained - clip.trained == head and learned.parameters == clip.parameters


def test_kept_activations_are_those_of_a_real_captioning_pass(small):
    model, batch = real(small)
    want = kept_bytes(model, lambda: captioning(model, batch, batch.features, paired=False))
    assert plan(small).activations["captioning"] == pytest.approx(want, rel=0.15)


def test_uneven_captions_of_the_same_mean_keep_as_much_and_pairs_no_more(small):
    run = replace(small, batch_size=16)
    lengths = [20, 4, 13, 9, 18, 7, 12, 14, 20, 4, 13, 9, 18, 7, 12, 12]
    assert sum(lengths) == sum(caption_lengths(run))
    model, batch = real(run, lengths=lengths)
    want, pairs = (kept_bytes(model, lambda p=p: captioning(model, batch, batch.features, p)) for p in (False, True))
    assert pairs <= want
    assert plan(run).activations["captioning"] == pytest.approx(want, rel=0.15)


def test_a_layer_keeps_what_its_operations_need(small):
    """Of N packed tokens: two inputs of layer norms and the activation; of S x T padded places: q, k, v, their output."""
    kept = plan(small).passes["captioning"].kept
    N, places, d = sum(caption_lengths(small)), 8 * 20, 128  # the image takes [RET]'s place
    assert kept["ReLU"] == 4 * 4 * N * 4 * d
    assert kept["LayerNorm"] == 4 * (2 * 4 + 1) * N * (d + 2)  # mean and deviation beside; one norm at the end
    assert kept["OPTAttention"] == pytest.approx(4 * 4 * places * (4 * d + 4), rel=0.02)  # log-sum-exp of 4 heads


def test_without_storage_the_counts_are_those_of_real_tensors(small):
    run = replace(small, stored_features=False)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with attention_in_parts():
        want = count(run, *real(run))
    got = plan(run)
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert got.parameters == want.parameters and got.flop == want.flop
    for name, passed in want.passes.items():
        assert got.passes[name].peak == pytest.approx(passed.peak, rel=0.02), name


def test_twice_the_batch_keeps_twice_as_much(small):
    once, twice = plan(replace(small, batch_size=32)), plan(replace(small, batch_size=64))
    for name in ("captioning", "the text pass"):
        assert twice.activations[name] == pytest.approx(2 * once.activations[name], rel=0.03)
    assert twice.flop == pytest.approx(2 * once.flop, rel=0.03)


def test_the_batch_has_the_mean_and_the_longest_caption_that_were_asked_for():
    for run in (Run(), Run(batch_size=7, tokens=12.6), Run(batch_size=2, max_tokens=14)):
        lengths = caption_lengths(run)
        assert len(lengths) == run.batch_size and max(lengths) == run.max_tokens
        assert sum(lengths) == round(run.batch_size * run.tokens) + run.batch_size
    assert caption_lengths(Run(batch_size=1)) == [24]


def test_an_untied_language_model_trains_a_second_row(tmp_path):
    LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ).save_pretrained(tmp_path)
    counted = plan(Run(lm=str(tmp_path), vision="toy", dtype="float32", batch_size=3, max_tokens=9, tokens=5))
    assert counted.parameters["[RET]"] == 2 * 32 and counted.flop > 0


def test_several_ret_tokens_are_planned_as_they_train(small):
    for several in (replace(small, r=4), replace(small, r=4, ret_attention="stacked", ret_fusion="transformer")):
        counted, one = plan(several), plan(small)
        assert counted.parameters["[RET]"] == 4 * one.parameters["[RET]"]
        assert ("fusion of [RET]" in counted.parameters) == (several.ret_fusion == "transformer")
        assert counted.trained == sum(p.numel() for p in real(several)[0].trained().values())
        assert f"4 {several.ret_attention} [RET], the longest 20" in counted.heading
        text = counted.passes["the text pass"]
        assert text.flop > one.passes["the text pass"].flop and sum(text.kept.values()) > 0
    with pytest.raises(UserError, match="tokens from 1 to max_tokens without"):
        read_run(str(find_config("toy.yaml")), tokens=11, max_tokens=14, r=4)


def test_tuples_are_planned_as_they_train(small):
    run = replace(small, composition_captioning_weight=1.0, composition_retrieval_weight=0.5, tuple_batch_size=6)
    counted, plain = plan(run), plan(small)
    tuples = counted.passes["the tuples"]
    assert "the tuples" not in plain.passes and "6 tuples" in counted.heading and "tuples" not in plain.heading
    assert sum(tuples.kept.values()) > 0 and counted.passes["the backward"].flop > plain.passes["the backward"].flop
    model, batch = real(run)
    made = _tuples(run, model)
    for tokens, lengths in ((made.conditions, made.lengths), (made.captions, made.caption_lengths)):
        for row, n in zip(tokens, lengths, strict=True):
            row[:n] = torch.randint(3, 400, (n,))
    held = kept_bytes(model, lambda: fast_composition(model, made, run.weights).loss)
    assert sum(tuples.kept.values()) == pytest.approx(held, rel=0.05)
    assert sum(plan(replace(run, chunk=3)).passes["the tuples"].kept.values()) < held
    assert count(run, model, batch._replace(tuples=made)).flop == counted.flop


def test_tuples_are_planned_from_a_configuration(tmp_path):
    both = [str(find_config(name)) for name in ("toy.yaml", "ablations/composition_both.yaml")]
    run = read_run(both)
    assert run.weights.composition_captioning == run.weights.composition_retrieval == 1.0
    assert not read_run(both[:1]).weights.composes
    with pytest.raises(UserError, match="step fast alone"):
        read_run(both, step="reference")


def test_published_sizes_of_opt():
    with torch.device("meta"):
        for size, billions in (("125m", 0.125), ("350m", 0.331), ("1.3b", 1.316), ("6.7b", 6.658), ("66b", 65.7)):
            hf = OPTForCausalLM(lm_config(f"facebook/opt-{size}"))
            assert sum(p.numel() for p in hf.parameters()) / 1e9 == pytest.approx(billions, rel=0.005)
    assert all(width % heads == 0 for _, width, heads in OPT.values())


def test_defaults_are_those_of_training():
    for owner in (FromageModule, CC3M):
        for name, parameter in inspect.signature(owner).parameters.items():
            if hasattr(Run, name):
                assert parameter.default in (getattr(Run, name), inspect.Parameter.empty), name


def test_the_verb_prints_the_plan_and_writes_it(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(["plan", "--config", "toy.yaml", "--batch-size", "6", "--tokens", "9", "--json", str(file)]) == 0
    text, figures = capsys.readouterr().out, json.loads(file.read_text())
    assert "PEAK MEMORY" in text and "an estimate, at 50% of 150 TFLOP/s" in text and "170 steps" in text
    assert figures["run"]["batch_size"] == 6 and figures["run"]["max_tokens"] == 40
    assert figures["peak_bytes"] == sum(figures["peak"].values())


@pytest.mark.parametrize(
    "options", [["--tokens", "90"], ["--batch-size", "0"], ["--vision", "nothing"], ["--lm", "./no/such/folder/here"]]
)
def test_what_cannot_be_planned_is_one_line(options, capsys):
    assert main(["plan", "--config", "toy.yaml", *options]) == 2
    assert capsys.readouterr().err.strip().count("\n") == 0


@pytest.mark.parametrize("wrong", ["batch_size: many", "batch_size: 2.9", "random_weights: 'no'"])
def test_a_value_of_the_wrong_kind_names_the_configuration(wrong, tmp_path):
    (tmp_path / "bad.yaml").write_text(f"data: {{init_args: {{{wrong}}}}}")
    name, value = wrong.replace("'", "").split(": ")
    with pytest.raises(UserError, match=rf"bad.yaml: {name} is '{value}', not "):
        read_run(str(tmp_path / "bad.yaml"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stored_features", [False, True])
def test_peak_memory_is_that_of_the_device(tmp_path, stored_features):
    """Weights, optimiser and a step; the allocator's rounding and the libraries' workspaces stay within 15 %."""
    opt(tmp_path, layers=12, width=1024, vocabulary=50272)
    run = Run(lm=str(tmp_path), vision="ViT-B-32", batch_size=180, stored_features=stored_features)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model, batch = real(run, "cuda")
    optimizer = torch.optim.Adam(list(model.trained().values()), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        fast_step(model, batch, False).loss.backward()
        optimizer.step()
    assert sum(plan(run).peak.values()) == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.15)


def test_the_paper_configuration_fits_24_gb_with_quantised_layers():
    whole = plan(read_run(find_config("cc3m.yaml")))
    for kind, share in (("int8", 1 / 2), ("nf4", 0.26)):
        small = plan(read_run(find_config("cc3m.yaml"), quantize=kind))
        # the embedding: 0.4
        assert small.weights[LM] - 0.4e9 == pytest.approx(share * (whole.weights[LM] - 0.4e9), rel=0.05)
        assert sum(small.peak.values()) < 20 * GIB and small.flop == whole.flop


def test_recomputing_and_chunks_keep_less_and_do_more(small):
    whole, again, chunks = plan(small), plan(replace(small, activation_checkpointing=True)), plan(replace(small, chunk=2))
    for other in (again, chunks):
        assert sum(other.peak.values()) < sum(whole.peak.values()) and other.flop > whole.flop
    model, batch = real(small)
    checkpoint_blocks(model.lm)
    assert count(small, model, batch).passes["captioning"].peak == again.passes["captioning"].peak


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_heads_that_share_keys_and_values_work_as_much_as_if_each_had_its_own(kv_heads):
    """Two products of T x e x T for each of 4 heads forward, five backward: one is computed again."""
    q, k, v = (torch.randn(2, heads, 16, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads))
    meter = Meter([q, k, v])
    attend = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        out = meter.run("forward", attend)
    meter.run("backward", out.sum().backward)
    product = 2 * 2 * 4 * 16 * 8 * 16
    assert (meter.passes["forward"].flop, meter.passes["backward"].flop) == (2 * product, 5 * product)


@pytest.mark.parametrize("path", ["fromage.OctopusModul", "mine.OtherModule"])
def test_a_run_of_an_unknown_class_is_not_planned_as_fromages(path, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(f"model:\n  class_path: {path}\n  init_args: {{lm: toy, vision: toy}}\n")
    assert main(["plan", "-c", str(config)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert path.rpartition(".")[2] in told and told.endswith("choose FromageModule or OctopusModule")
