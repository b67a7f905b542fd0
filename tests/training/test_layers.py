"""Layers recomputed, compiled or spread over devices: the same losses and gradients as without."""

import pytest
import torch
from test_distributed import join, leave, mean_gradients
from test_fast_step import build, make_batch, run
from two_processes import on_two_processes

from fromage.training.fast_step import fast_step
from fromage.training.layers import checkpoint_blocks, compile_blocks, shard_blocks
from fromage.training.meter import Meter
from fromage.training.reference_step import reference_step

LENGTHS = [5, 12, 3, 24, 20, 7, 2, 9]


def same_with(change, kind, step, paired, tolerance=1e-6):
    model = build(kind, 2)
    batch = make_batch(model, LENGTHS)
    want, grads = run(step, model, batch, paired)
    change(model.lm)
    got, got_grads = run(step, model, batch, paired)
    torch.testing.assert_close(got.loss, want.loss, rtol=tolerance, atol=tolerance)
    for name, grad in grads.items():
        assert (got_grads[name] - grad).norm() <= 10 * tolerance * grad.norm(), name


@pytest.mark.parametrize("step", [reference_step, fast_step])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_recomputed_layers_give_the_same_gradients(kind, step):
    same_with(checkpoint_blocks, kind, step, paired=True)


def test_compiled_layers_give_the_same_gradients():
    same_with(compile_blocks, "tied", fast_step, paired=False, tolerance=1e-5)


def test_compiled_and_recomputed_go_together():
    def both(lm):
        compile_blocks(lm)
        checkpoint_blocks(lm)

    same_with(both, "tied", fast_step, paired=True, tolerance=1e-5)


def test_recomputed_layers_keep_less():
    kept = {}
    for again in (False, True):
        model = build("tied", 1)
        batch = make_batch(model, [24] * 16)
        if again:
            checkpoint_blocks(model.lm)
        meter = Meter([*model.parameters(), *model.buffers(), batch.ids, batch.features])
        meter.run("forward", lambda model=model, batch=batch: fast_step(model, batch, False).loss)
        kept[again] = meter.live
    assert kept[True] < 0.6 * kept[False]


def one_of_two(rank, kind, store, out):
    join(rank, store)
    model = build(kind, 1)
    whole = sum(p.numel() for block in model.lm.blocks for p in block.parameters())
    shard_blocks(model.lm, "cpu")
    held = sum(p.to_local().numel() for block in model.lm.blocks for p in block.parameters())
    grads = mean_gradients(rank, fast_step, model)
    if rank == 0:
        torch.save((grads, held / whole), out)
    leave()


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_layers_spread_over_two_processes_give_the_gradients_of_one(kind, tmp_path):
    on_two_processes(one_of_two, kind, tmp_path / "store", tmp_path / "grads.pt")
    two, share = torch.load(tmp_path / "grads.pt")
    _, want = run(fast_step, build(kind, 1), make_batch(build(kind, 1), LENGTHS), False)
    assert share == pytest.approx(0.5, abs=0.01)
    for name, grad in want.items():
        assert (two[name] - grad).norm() < 1e-5 * grad.norm(), name
