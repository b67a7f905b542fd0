"""Two processes with half a batch each against one with the whole batch."""

import os

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_fast_step import build, make_batch

from fromage.data import CC3M
from fromage.fast_step import fast_step
from fromage.lightning_module import FromageModule
from fromage.plain_step import plain_step

LENGTHS = [5, 12, 3, 24, 20, 7, 2, 9]  # the halves have different numbers of tokens


def part(batch, start, stop):
    return batch._replace(ids=batch.ids[start:stop], lengths=batch.lengths[start:stop], features=batch.features[start:stop])


def one_of_two(rank, name, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = build("tied", 1)
    step = {"fast": fast_step, "plain": plain_step}[name]
    step(model, part(make_batch(model, LENGTHS), 4 * rank, 4 * rank + 4), False).loss.backward()
    grads = {n: p.grad for n, p in model.trained().items()}
    for grad in grads.values():  # as DDP does
        dist.all_reduce(grad)
        grad /= 2
    if rank == 0:
        torch.save(grads, out)
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["fast", "plain"])
def test_two_processes_give_the_gradients_of_one_with_the_whole_batch(name, tmp_path):
    mp.spawn(one_of_two, (name, tmp_path / "store", tmp_path / "grads.pt"), nprocs=2)
    model = build("tied", 1)
    {"fast": fast_step, "plain": plain_step}[name](model, make_batch(model, LENGTHS), False).loss.backward()
    two = torch.load(tmp_path / "grads.pt")
    for parameter, p in model.trained().items():
        error = (two[parameter] - p.grad).norm() / p.grad.norm()
        assert error < 1e-5, f"{parameter}: {error:.1e}"


def fit(rank, world, store, out):
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank), RANK=str(rank)
    )
    pl.seed_everything(0)
    module = FromageModule(lm="toy", vision="toy", vision_weights=None, dtype="float32", q=16)
    # 40 validation pairs in batches of 16: three batches, so one process has a batch that the other lacks
    data = CC3M(str(world / "train"), str(world / "val"), batch_size=16, max_tokens=40, workers=0)
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, val_check_interval=2,
                         check_val_every_n_epoch=None, num_sanity_val_steps=0, enable_progress_bar=False,
                         enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, data)
    if rank == 0:
        torch.save({k: float(v) for k, v in trainer.callback_metrics.items()}, out)


def test_lightning_trains_and_validates_on_two_processes(tmp_path):
    from fromage.toy.world import make_world

    world = tmp_path / "world"
    make_world(world, seed=1, train=1100, val=40, stories=2, dialogues=2, refs=2, progress=False)  # two shards of training
    port = 20000 + os.getpid() % 20000
    mp.spawn(fit, (world / "cc3m", port, tmp_path / "figures.pt"), nprocs=2)
    figures = torch.load(tmp_path / "figures.pt")
    hits = figures["val/t2i_r10"] * 40 / 100
    assert hits == pytest.approx(round(hits), abs=1e-3), "recall over all 40 pairs, those of both processes"
