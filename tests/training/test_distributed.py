"""Two processes with half a batch each against one with the whole batch."""

import faulthandler
import os

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from test_fast_step import build, make_batch
from two_processes import on_two_processes

from fromage.data.datamodule import CC3M
from fromage.data.packing import pack_coco
from fromage.evals.retrieval import evaluate
from fromage.models.fromage import load_model
from fromage.training.fast_step import fast_step
from fromage.training.gather import gathered
from fromage.training.module import FromageModule
from fromage.training.reference_step import reference_step
from fromage.training.strategy import ShardedTowers

STRATEGIES = {"ddp": DDPStrategy, "sharded": ShardedTowers}
LENGTHS = [5, 12, 3, 24, 20, 7, 2, 9]  # the halves have different numbers of tokens


def join(rank, store):
    """Be one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def leave():
    """End a process of a group: gloo's threads sometimes abort Python's own way out."""
    dist.barrier()
    os._exit(0)


def mean_gradients(rank, step, model):
    """Of both processes, each with its half of the batch."""
    step(model, make_batch(model, LENGTHS).part(4 * rank, 4 * rank + 4), False).loss.backward()
    grads = {n: p.grad for n, p in model.trained().items()}
    for grad in grads.values():  # as DDP does
        dist.all_reduce(grad)
        grad /= 2
    return grads


def one_of_two(rank, step, store, out):
    join(rank, store)
    grads = mean_gradients(rank, step, build("tied", 1))
    different = gathered([{f"of {rank}": rank}] * (1 + rank))
    if rank == 0:
        torch.save((grads, different), out)
    leave()


@pytest.mark.parametrize("step", [fast_step, reference_step])
def test_two_processes_give_the_gradients_of_one_with_the_whole_batch(step, tmp_path):
    on_two_processes(one_of_two, step, tmp_path / "store", tmp_path / "grads.pt")
    model = build("tied", 1)
    step(model, make_batch(model, LENGTHS), False).loss.backward()
    two, different = torch.load(tmp_path / "grads.pt")
    assert different == [{"of 0": 0}, {"of 1": 1}, {"of 1": 1}] and gathered([7]) == [7]
    for parameter, p in model.trained().items():
        error = (two[parameter] - p.grad).norm() / p.grad.norm()
        assert error < 1e-5, f"{parameter}: {error:.1e}"


def fit(rank, world, store, strategy, out):
    faulthandler.dump_traceback_later(180, exit=True)  # rather than wait for each other for ever
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank), RANK=str(rank)
    )
    pl.seed_everything(0)
    module = FromageModule(lm="toy", vision="toy", vision_weights=None, dtype="float32", q=16)
    # 40 validation images in batches of 16: three batches, so one process has a batch that the other lacks
    data = CC3M(str(world / "train"), str(world / "captioned"), batch_size=16, max_tokens=40, workers=0)
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=2,
        strategy=STRATEGIES[strategy](),
        logger=False,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(out / "last.ckpt")
    if rank == 0:
        torch.save({k: float(v) for k, v in trainer.callback_metrics.items()}, out / "figures.pt")
    leave()


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    from fromage.toy.world import make_world

    world = tmp_path_factory.mktemp("two") / "world"
    make_world(world, seed=1, train=1100, val=40, stories=2, dialogues=2, refs=2, progress=False)
    coco = world / "coco"
    pack_coco(coco / "annotations" / "captions_val2017.json", coco / "val2017", world / "cc3m" / "captioned")
    return world / "cc3m"


@pytest.fixture(scope="module")
def fitted(two_shards, tmp_path_factory):
    """Folders of two runs on two processes."""
    outs = {}
    for i, name in enumerate(STRATEGIES):
        outs[name] = tmp_path_factory.mktemp(name)
        on_two_processes(fit, two_shards, 20000 + os.getpid() % 20000 + i, name, outs[name])
    return outs


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lightning_trains_and_validates_on_two_processes(fitted, two_shards, strategy):
    figures = torch.load(fitted[strategy] / "figures.pt")
    model = load_model(fitted[strategy] / "last.ckpt")
    data = CC3M("unused", str(two_shards / "captioned"), batch_size=16, max_tokens=40, workers=0)
    data.attach(model.vision.transform, model.tokenizer)
    want = evaluate(model, data.val_dataloader())  # in one process
    found = {name: figures[f"val/{name}"] for name in want}
    assert found == pytest.approx(want, abs=0.51), "over all 40 images and 200 captions, those of both processes"
    assert want["t2i_r10"] > 0


def test_sharded_towers_train_as_whole_ones_do(fitted):
    whole, sharded = (load_model(fitted[name] / "last.ckpt").trained() for name in STRATEGIES)
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-4, atol=1e-5)
