"""Stage 3 with the whole language model in parts on two processes against one process with the same rows."""

import faulthandler
import os
from shutil import copyfile

import pytest
import pytorch_lightning as pl
import torch
from two_processes import on_two_processes

from fromage.errors import UserError
from fromage.octopus import OctopusData, OctopusModule, RefCOCO, load_octopus
from fromage.octopus.planner import Run, plan
from fromage.training.checkpoint_io import SafeCheckpoint
from fromage.training.strategy import ShardedModel, ShardedTowers

SMALL = {"lm": "toy", "vision": "toy", "num_queries": 4, "decoder_width": 16, "decoder_layers": 1, "heads": 2}
STEPS = 4


class Steady(OctopusModule):
    """With a large eps: Adam would enlarge what is rounded off of the smallest gradients until the losses differ too."""

    def configure_optimizers(self):
        found = super().configure_optimizers()
        for group in found["optimizer"].param_groups:
            group["eps"] = 0.01
        return found


class Losses(pl.Callback):
    """The losses of each step, and the bytes of parameters, gradients and moments here."""

    def __init__(self):
        self.seen, self.held = [], {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append([float(trainer.callback_metrics[f"train/{name}_loss"]) for name in ("answer", "score", "giou")])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        local = lambda t: getattr(t, "_local_tensor", t).nbytes  # noqa: E731
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        moments = [m for p in trained for n, m in optimizer.state[p].items() if n.startswith("exp")]
        self.held = {"trained parameters": sum(map(local, trained)), "their gradients": sum(local(p.grad) for p in trained)}
        self.held["their Adam moments"] = sum(map(local, moments))


def fit(world, out, strategy="auto", devices=1, resume=None, steps=STEPS):
    """The losses of a short run, and what the device holds at its end."""
    coco = world / "refcoco"
    pl.seed_everything(0)
    source = RefCOCO(str(coco / "refs(unc).p"), str(coco / "instances.json"), str(coco / "images"), split="train", limit=60)
    data = OctopusData([source], [source], batch_size=2 // devices, val_batch_size=4, per_image=3, workers=0)
    module = Steady(stage=3, vision_weights=None, dtype="float32", lr=1e-3, warmup_steps=1, **SMALL)
    losses, saver = (
        Losses(),
        SafeCheckpoint(
            out / "checkpoints", save_last=True, save_top_k=-1, every_n_train_steps=2, enable_version_counter=False
        ),
    )
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=devices, strategy=strategy,
        logger=False, callbacks=[losses, saver], val_check_interval=2, check_val_every_n_epoch=None, limit_val_batches=1,
        gradient_clip_val=0.5, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume)
    return losses


def of_two(rank, world, port, out, resume, dtype, steps):
    faulthandler.dump_traceback_later(240, exit=True)  # rather than wait for each other for ever
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank)}
    found = fit(world, out, ShardedModel(dtype), 2, resume, steps)
    torch.save((found.seen, found.held), out / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads sometimes abort Python's own way out


def both(world, out, resume=None, dtype=None, steps=STEPS):
    """Losses of each step, the means of both processes, and what the first holds."""
    port = 40000 + (os.getpid() * 7 + len(str(out))) % 20000
    on_two_processes(of_two, world, port, out, resume, dtype, steps)
    (first, held), (second, _) = (torch.load(out / f"{rank}.pt") for rank in (0, 1))
    return ((torch.tensor(first) + torch.tensor(second)) / 2).tolist(), held


@pytest.fixture(scope="module")
def one(world, tmp_path_factory):
    """A run of one process: its folder and losses."""
    out = tmp_path_factory.mktemp("one")
    found = fit(world, out)
    return out, found.seen, found.held


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    """The same of two processes."""
    out = tmp_path_factory.mktemp("two")
    return out, *both(world, out)


def last(out):
    return out / "checkpoints" / "last.ckpt"


def same_weights(found, want):
    ours, theirs = (load_octopus(str(last(out))).saved_parameters() for out in (found, want))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=2e-6, msg=name)


def test_two_processes_have_the_losses_and_end_with_the_weights_of_one(one, two):
    assert len(one[1]) == len(two[1]) == STEPS
    torch.testing.assert_close(torch.tensor(two[1]), torch.tensor(one[1]), rtol=2e-5, atol=1e-6)
    same_weights(two[0], one[0])
    start = OctopusModule(stage=3, vision_weights=None, dtype="float32", **SMALL)
    start.configure_model()
    moved = {
        name
        for name, p in load_octopus(str(last(two[0]))).saved_parameters().items()
        if not p.equal(start.model.get_parameter(name))
    }
    assert {"queries", "visual_prefix.weight"} < moved and any(name.startswith("lm.") for name in moved)


def test_each_process_holds_half_of_weights_gradients_and_moments(one, two):
    for name, whole in one[2].items():
        assert two[2][name] == pytest.approx(whole / 2, rel=0.02), name
    assert two[2]["their Adam moments"] == 2 * two[2]["trained parameters"]
    planned = plan(Run(stage=3, dtype="float32", devices=2, batch_size=1, **SMALL))
    for name, size in two[2].items():
        assert planned.held[name] == pytest.approx(size, rel=0.02), name


def test_two_processes_go_on_from_a_checkpoint_of_theirs(world, two, tmp_path):
    last(tmp_path).parent.mkdir()
    copyfile(next((two[0] / "checkpoints").glob("*step=2.ckpt")), last(tmp_path))
    again, _ = both(world, tmp_path, str(last(tmp_path)))
    torch.testing.assert_close(torch.tensor(again), torch.tensor(two[1][2:]), rtol=1e-6, atol=1e-6)
    same_weights(tmp_path, two[0])


def test_layers_run_in_bfloat16_and_weights_stay_float32(world, one, tmp_path):
    found, held = both(world, tmp_path, steps=1, dtype="bfloat16")
    assert held["trained parameters"] == pytest.approx(one[2]["trained parameters"] / 2, rel=0.02)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(one[1][:1]), rtol=0.05, atol=0.05)
    assert not torch.equal(torch.tensor(found), torch.tensor(one[1][:1]))


def test_a_language_model_that_is_trained_is_not_for_sharded_towers():
    module = OctopusModule(stage=3, vision_weights=None, dtype="float32", **SMALL)
    module.configure_model()
    strategy = ShardedTowers()
    strategy.connect(module)
    with pytest.raises(UserError, match="ShardedModel"):
        strategy.model_to_device()
