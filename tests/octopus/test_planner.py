"""The plan of Octopus' runs against what autograd keeps in a real step, counts by hand, and the defaults of training."""

import inspect
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from fromage.cli.main import main
from fromage.errors import UserError
from fromage.models import cpu_linear
from fromage.models.vision.registry import plan_vision
from fromage.octopus import planner
from fromage.octopus.data import OctopusData
from fromage.octopus.module import OctopusModule
from fromage.octopus.planner import Run, build, count, in_order, lay_out, prepare, read_run
from fromage.octopus.queries import QUERY
from fromage.octopus.step import octopus_step
from fromage.training.configs import find_config
from fromage.training.meter import Meter, attention_in_parts
from fromage.training.plan import LM, TOWER

GIB = 2**30
plan = cache(planner.plan)  # of one run, several tests ask
TOYS = {"lm": "toy", "vision": "toy", "dtype": "float32", "num_queries": 4, "decoder_width": 32, "decoder_layers": 2}
SMALL = Run(stage=3, batch_size=2, per_image=3, heads=4, stored_features=True, **TOYS)


def real(run):
    """The model with storage, and a batch."""
    model = build(run, plan_vision(run.vision, run.dtype, run.vision_layer))
    torch.manual_seed(0)
    prepare(run, model)
    return model, lay_out(run, model)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def files(*names):
    return [find_config(name) for name in names]


def test_the_layout_is_that_of_the_run():
    model, batch = real(SMALL)
    assert len(batch.examples) == 6 and batch.objects.counts == [1] * 6
    assert batch.prompts.lengths == [model.k + 3 * (12 + 4 + 1)] * 2
    assert (batch.prompts.ids == model.tokenizer.added[QUERY]).sum() == 24
    assert batch.fed.lengths == [3 * 23] * 2 and len(batch.answers) == 6 * 24


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("again", [False, True])
def test_without_storage_the_counts_are_those_of_real_tensors(stage, again, monkeypatch):
    monkeypatch.setattr(cpu_linear, "mkl_is_slow", lambda: False)  # checkpointing would run a layer's last product again
    run = replace(SMALL, stage=stage, objects=int(stage > 1), activation_checkpointing=again, stored_features=stage > 1)
    with attention_in_parts():
        want = count(run, *real(run))
    got = plan(run)
    assert got.parameters == want.parameters and got.flop == want.flop and got.held == want.held
    for name, passed in want.passes.items():
        assert got.passes[name].peak == pytest.approx(passed.peak, rel=0.02), name


def test_what_the_forward_keeps_is_what_autograd_saves():
    model, batch = real(SMALL)
    weights, saved = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = octopus_step(model, batch).loss
    assert loss.isfinite()
    assert plan(SMALL).activations["the forward"] == pytest.approx(sum(n for _, n in saved.values()), rel=0.03)


def test_the_matching_costs_nothing_but_its_values():
    model, batch = real(SMALL)
    meter = Meter([])
    flop = []
    for matcher in ({}, {"matcher": in_order}):
        before = meter.flop
        meter.run("step", lambda matcher=matcher: octopus_step(model, batch, **matcher))
        flop.append(meter.flop - before)
    assert flop[0] == flop[1]


def test_the_paper_configurations_are_counted_without_their_weights():
    before = resident()
    one, two = (plan(read_run(files(f"octopus_stage{stage}.yaml"))) for stage in (1, 2))
    assert resident() - before < 0.5 * GIB  # the weights alone are 13
    assert one.parameters[LM] == 6_738_415_616 and one.trained == one.parameters["W_c"] == 1024 * 4096 + 4096
    trained = ("queries", "DETR decoder", "index tokens")
    assert two.trained == sum(two.parameters[part] for part in trained) and two.parameters["queries"] == 64 * 4096
    tokens = 576 + 12 + 24  # and the words of the template; two FLOP a weight, forward and, for inputs alone, backward
    assert one.flop / one.examples == pytest.approx(tokens * 4 * 6.6e9 + one.passes["the vision tower"].flop / 16, rel=0.1)
    for counted in (one, two):
        assert sum(counted.peak.values()) < 75 * GIB


def test_conversations_that_share_a_row_take_a_fraction_of_the_work():
    run = read_run(files("octopus_stage2.yaml"), per_image=8, batch_size=1)
    shared, alone = plan(run), plan(replace(run, per_image=1, batch_size=8))
    assert shared.examples == alone.examples == 8
    assert alone.flop > 3 * shared.flop and sum(alone.activations.values()) > 3 * sum(shared.activations.values())


def test_eight_devices_hold_an_eighth_of_what_is_trained_each():
    eight = read_run(files("octopus_stage3.yaml", "octopus_stage3_8gpu.yaml"))
    assert (eight.devices, eight.lora_rank, eight.dtype, eight.layers_dtype) == (8, 0, "float32", "bfloat16")
    shared, whole = plan(eight), plan(replace(eight, devices=1))
    assert shared.trained == whole.trained > 6.7e9
    for name in ("trained parameters", "their gradients", "their Adam moments"):
        assert shared.held[name] == pytest.approx(whole.held[name] / 8, rel=1e-3)
    assert shared.held[TOWER] == whole.held[TOWER]
    assert sum(whole.held.values()) > 100 * GIB and sum(shared.peak.values()) < 75 * GIB
    assert shared.flop == pytest.approx(whole.flop, rel=0.01)
    assert 1.5 * shared.activations["the forward"] < whole.activations["the forward"]  # in bfloat16
    assert {"two layers, gathered", "gradients of a layer, until they are summed"} <= shared.peak.keys()


def test_a_frozen_language_model_is_spread_and_one_with_adapters_is_not():
    two = replace(SMALL, stage=2)
    spread, alone, copies = (plan(run) for run in (replace(two, devices=8), two, replace(SMALL, lora_rank=8, devices=8)))
    assert spread.held[LM] < 0.5 * alone.held[LM] == 0.5 * copies.held[LM]  # the embedding stays whole
    assert spread.held["trained parameters"] == alone.held["trained parameters"]
    assert "two layers, gathered" in spread.peak and "gradients in DDP's buckets" in copies.peak


def test_adapters_quantised_layers_and_layers_that_run_again():
    plain = replace(SMALL, lora_rank=8)
    whole, small, again = (plan(replace(plain, **o)) for o in ({}, {"quantize": "nf4"}, {"activation_checkpointing": True}))
    linear = 4 * (4 * (192 + 192) + 2 * (192 + 768))  # inputs and outputs of 6 layers in each of 4 blocks
    assert whole.parameters["adapters"] == 8 * linear and whole.trained > whole.parameters["adapters"]
    assert small.held[LM] < 0.5 * whole.held[LM] and small.flop == whole.flop and "a weight, dequantised" in small.peak
    assert sum(again.activations.values()) < 0.5 * sum(whole.activations.values()) and again.flop > 1.2 * whole.flop


def test_masks_are_counted():
    masked = replace(SMALL, stage=2, mask_scale=4)
    plain, more = plan(replace(masked, mask_scale=0)), plan(masked)
    assert more.trained > plain.trained and more.flop > plain.flop and more.batch > plain.batch
    with attention_in_parts():
        want = count(masked, *real(masked))
    assert more.flop == want.flop and more.activations["the forward"] == want.activations["the forward"]


def test_defaults_are_those_of_training():
    for owner in (OctopusModule, OctopusData):
        for name, parameter in inspect.signature(owner).parameters.items():
            if hasattr(Run, name):
                assert parameter.default in (getattr(Run, name), inspect.Parameter.empty), name


def test_the_verb_plans_what_lies_behind_one_another(tmp_path, capsys):
    file = tmp_path / "plan.json"
    toys = ["octopus_toy3.yaml", "--lm", "toy", "--batch-size", "2", "--per-image", "2", "--devices", "2"]
    assert main(["plan", "--config", *toys, "--json", str(file)]) == 0
    text, figures = capsys.readouterr().out, json.loads(file.read_text())
    assert "PEAK MEMORY of each of 2 devices" in text and "TFLOP a step on each of 2 devices" in text
    assert figures["run"]["stage"] == 3 and figures["examples"] == 4
    assert figures["peak_bytes"] == sum(figures["peak"].values())
    assert main(["plan", "--config", "octopus_toy3.yaml", "--config", "octopus_sequential.yaml"]) == 0
    assert "DETR" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["octopus_toy3.yaml", "--chunk", "4"], "--chunk"),
        (["toy.yaml", "--devices", "2"], "--devices"),
        (["octopus_toy3.yaml", "--answer-tokens", "1"], "</s>"),
        (["octopus_toy3.yaml", "--objects", "9", "--answer-tokens", "30"], "8 object queries"),
        (["octopus_toy3.yaml", "--batch-size", "0"], "batch_size is 0"),
        (["octopus_toy2.yaml", "--config", "octopus_sequential.yaml"], "stage 2"),
    ],
)
def test_what_cannot_be_planned_is_one_line(options, told, capsys):
    assert main(["plan", "--config", *options]) == 2
    said = capsys.readouterr().err.strip()
    assert told in said and "\n" not in said


def test_a_language_model_that_is_trained_cannot_be_quantised():
    with pytest.raises(UserError, match="adapters only"):
        read_run(files("octopus_toy3.yaml"), quantize="nf4")
