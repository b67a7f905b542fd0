"""What can only be checked on a CUDA device: parity, compiled layers, memory, and that no step waits for the device."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from fromage.data.datamodule import CC3M
from fromage.data.image_source import Item
from fromage.generation.generate import generate
from fromage.generation.options import Decoding
from fromage.octopus import Instructions, OctopusData, OctopusModule, RefCOCO
from fromage.retrieval.faiss_index import FaissIndex
from fromage.training.fast_step import fast_step
from fromage.training.layers import checkpoint_blocks, compile_blocks
from fromage.training.module import FromageModule
from fromage.training.reference_step import reference_step
from fromage.training.strategy import ShardedTowers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE, ACCELERATOR = "cuda", "gpu"
SIZES = {"width": 256, "layers": 4, "heads": 4, "vision": "ViT-S-32", "batch": 24, "dtype": "float32"}
LLAMA = {"family": "llama", "kv_heads": 2, "ffn": 512, "tokens": 49152}
FAMILIES = [{}, LLAMA]


@pytest.fixture
def tool(monkeypatch):
    """A module of tools/, by name."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "tools")
    return lambda name: __import__(name)


@pytest.fixture
def bench(tool):
    """bench_step, whose models and batches the tests use."""
    return tool("bench_step")


@pytest.fixture(autouse=True)
def exact():
    """No TF32: float32 products have 24 bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def model(bench):
    torch.manual_seed(0)
    return bench.build(SIZES, DEVICE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("paired", [False, True])
def test_losses_and_gradients_of_both_steps_agree_in_float32(bench, family, paired):
    torch.manual_seed(0)
    model = bench.build(SIZES | family, DEVICE)
    batch = bench.make_batch(model, SIZES["batch"], 0, pixels=True)
    with torch.no_grad():
        reference, fast = (step(model, batch, paired) for step in (reference_step, fast_step))
    for name in ("captioning_loss", "text_loss", "contrastive_loss"):
        torch.testing.assert_close(getattr(fast, name), getattr(reference, name), rtol=1e-5, atol=1e-5)
    want, got = (bench.gradients(step, model, batch, paired) for step in (reference_step, fast_step))
    assert want.keys() == got.keys() and bench.apart(got, want) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_the_fast_step_is_as_near_to_float32_as_the_plain_one(bench, family):
    errors = bench.precision_errors(SIZES | family, DEVICE)["max_rel_grad_error_bfloat16"]
    assert 0 < errors["reference"] < 0.2 and errors["fast"] < 1.5 * errors["reference"]


def test_layers_that_are_recomputed_give_the_same_gradients(bench, model):
    batch = bench.make_batch(model, SIZES["batch"], 0, pixels=False)
    want = bench.gradients(fast_step, model, batch, True)
    checkpoint_blocks(model.lm)
    assert bench.apart(bench.gradients(fast_step, model, batch, True), want) < 1e-5


@contextlib.contextmanager
def no_waiting():
    """Within, an operation that makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pixels", [True, False])
@pytest.mark.parametrize("paired", [False, True])
def test_a_fast_step_never_waits_for_the_device(bench, dtype, pixels, paired):
    model = bench.build(SIZES | {"dtype": dtype}, DEVICE)
    optimizer = torch.optim.Adam(list(model.trained().values()), lr=1e-4)
    batch = bench.make_batch(model, SIZES["batch"], 0, pixels)
    bench.one_step(fast_step, model, optimizer, batch, paired)  # the optimiser makes its state
    with no_waiting():
        bench.one_step(fast_step, model, optimizer, batch, paired)


def test_the_check_for_waiting_sees_a_wait():
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(3, device=DEVICE).sum().item()


def test_the_fast_step_needs_less_memory(bench):
    measured = bench.Bench("tiny", DEVICE)
    measured.preset = measured.preset | {"batch": 32}
    measured.peaks({"reference": (reference_step, True), "fast": (fast_step, True)})
    assert measured.report()["peak_memory_ratio"] < 0.4


def test_the_profile_sees_kernels_and_no_wait(tool, bench):
    measured = bench.Bench("tiny", DEVICE)
    step = measured.step(fast_step, measured.batch(0, True), False)
    found = tool("profile_step").profiled(measured, step, 1024)
    assert found["launches"] > 100 and found["host_synchronisations"] == 0 and found["waits"] == 0
    assert 0 < found["share_of_products"] < 1 and 0 < found["busy_share"] <= 1 and found["share_of_rate"] < 1


def test_answers_are_the_same_with_and_without_a_cache(tool, model):
    model = tool("bench_generate").with_words(model)
    image = torch.randn(model.vision.width, device=DEVICE)
    prompts = [["7 8 9", image, "10 11"], ["12 13 14 15 16"]]
    kept, again = (generate(model, prompts, Decoding(12, 12, use_cache=cache)) for cache in (True, False))
    assert [answer.ids for answer in kept] == [answer.ids for answer in again] and len(kept[0].ids) == 12


def test_brute_force_on_the_card_finds_what_the_index_finds(tool):
    bench = tool("bench_index")
    mixture = bench.Mixture(50, 0)
    rows, queries = mixture.rows(5000), mixture.rows(20)
    index = FaissIndex.build(rows, [Item(str(i)) for i in range(len(rows))], "a model")
    near = bench.brute(torch.from_numpy(rows).to(DEVICE), queries, 10)
    found = np.array([[hit.row for hit in hits] for hits in index.search(queries, 10)])
    assert np.mean(near == found) > 0.99  # scores that are equal but for rounding may change places


def test_octopus_trains_in_every_stage(tool):
    stages = tool("bench_octopus").measure("tiny", DEVICE, 1)["stages"]
    assert all(stage["seconds"] > 0 and stage["peak_memory_bytes"] > 0 for stage in stages.values()), stages


def test_octopus_finds_the_same_boxes_as_on_the_cpu(tool):
    bench = tool("bench_grounding")
    torch.manual_seed(0)
    model = bench.build(bench.PRESETS["tiny"], 8, "cpu")
    patches = torch.randn(model.vision.shape)
    here = bench.answer(model, patches, 3)
    there = bench.answer(model.to(DEVICE), patches.to(DEVICE), 3)
    torch.testing.assert_close(torch.tensor(there.boxes), torch.tensor(here.boxes), rtol=1e-3, atol=1e-4)


def test_compiled_layers_give_the_same_gradients(bench, model):
    batches = [bench.make_batch(model, SIZES["batch"], seed, pixels=False) for seed in (0, 1)]
    want = [bench.gradients(fast_step, model, batch, True) for batch in batches]
    compile_blocks(model.lm)
    for batch, grads in zip(batches, want, strict=True):
        assert bench.apart(bench.gradients(fast_step, model, batch, True), grads) < 1e-4


def test_the_static_cache_is_compiled_and_gives_the_same_tokens(tool, bench):
    found = tool("bench_generate").measure("tiny", DEVICE, 1, static=True)["static_cache"]
    assert found["offered"], found
    assert found["compiled"] and found["same_tokens"]


def fit(module, data, strategy="auto"):
    """A few steps of `lightning fit` on the card, after a sanity check, from images that other processes decode."""
    trainer = pl.Trainer(accelerator=ACCELERATOR, devices=1, strategy=strategy, max_steps=3, limit_val_batches=1,
                         num_sanity_val_steps=1, log_every_n_steps=2, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0)  # fmt: skip
    trainer.fit(module, data)
    assert trainer.global_step == 3 and float(trainer.callback_metrics["train/loss"]) > 0
    return module


@pytest.mark.parametrize("strategy", ["auto", "sharded"])
def test_fromage_is_fitted(strategy, world):
    module = FromageModule(lm="toy", vision="toy", dtype="float32", q=32)
    data = CC3M(*(str(world / "cc3m" / part) for part in ("train", "val")), batch_size=16, max_tokens=40, workers=2)
    fit(module, data, ShardedTowers() if strategy == "sharded" else "auto")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_octopus_is_fitted(stage, world):
    module = OctopusModule(stage=stage, lm="toy", vision="toy", num_queries=8, decoder_layers=1, heads=2, dtype="float32")
    refs = (world / "refcoco" / name for name in ("refs(unc).p", "instances.json", "images"))
    captions = str(world / "llava" / "pretrain_train.json"), str(world)
    sources = [Instructions(*captions) if stage == 1 else RefCOCO(*map(str, refs), split="train")]
    fit(module, OctopusData(sources, sources, batch_size=4, workers=2))
