"""Time the plain training step against the fast one, interleaved in one run, on random weights.

    python tools/bench_step.py --preset cpu                  # 12-layer OPT 768 wide, ViT-B/32, batch 32
    python tools/bench_step.py --preset paper --device cuda  # OPT-6.7B, ViT-L/14, batch 180, bfloat16

The plain side is the authors' computation as it is: both passes padded to 24 tokens, each image encoded twice, the whole
backward in both. Speed does not depend on the values of the weights. Caption lengths are drawn from those of all 25,014
captions of COCO val2017 in OPT's vocabulary. Memory is the peak above the weights: of the device allocator on CUDA; on a
CPU of the tensors alive, counted operation by operation in a run of its own (fromage.training.meter).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from transformers import OPTConfig, OPTForCausalLM

from fromage.checkpoints.format import DTYPES
from fromage.data.batches import Batch
from fromage.models.fromage import Fromage
from fromage.models.language_model import LanguageModel
from fromage.models.vision.open_clip import OpenClipTower
from fromage.training.fast_step import fast_step
from fromage.training.layers import compile_blocks
from fromage.training.meter import Meter
from fromage.training.reference_step import StepOutput, reference_step

Step = Callable[[Fromage, Batch, bool], StepOutput]

# words of a caption in tokens, without </s> and [RET]: how many of COCO val2017's captions have so many
LENGTHS = {
    7: 66, 8: 793, 9: 3056, 10: 4333, 11: 4736, 12: 4052, 13: 2930, 14: 1851, 15: 1150, 16: 717, 17: 434, 18: 278, 19: 187,
    20: 108, 21: 94, 22: 258,
}  # fmt: skip
MAX_TOKENS = 24
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"width": 768, "layers": 12, "heads": 12, "vision": "ViT-B-32", "batch": 32, "dtype": "float32"},
    "paper": {"width": 4096, "layers": 32, "heads": 32, "vision": "ViT-L-14", "batch": 180, "dtype": "bfloat16"},
    "tiny": {"width": 64, "layers": 2, "heads": 2, "vision": "ViT-S-32", "batch": 4, "dtype": "float32"},
}


def build(preset: dict[str, Any], device: str) -> Fromage:
    """OPT with its 50,272 rows and an open_clip tower, random weights, on the device from the start."""
    dtype = DTYPES[preset["dtype"]]
    ids = SimpleNamespace(
        vocab_size=50265, image_id=50265, ret_id=50266, row_ids=[50266], pad_id=1, bos_id=2, eos_id=2, start=lambda: [2]
    )
    config = OPTConfig(
        vocab_size=50272, hidden_size=preset["width"], word_embed_proj_dim=preset["width"], ffn_dim=4 * preset["width"],
        num_hidden_layers=preset["layers"], num_attention_heads=preset["heads"], dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        opt = OPTForCausalLM(config)
        clip = open_clip.create_model(preset["vision"], pretrained=None, device=device)
    torch.set_default_dtype(before)
    tower = OpenClipTower(clip.to(dtype), None, preset["vision"])
    return Fromage(LanguageModel(opt, ids, "opt"), tower).to(device)  # type: ignore[arg-type]


def make_batch(model: Fromage, size: int, seed: int, pixels: bool) -> Batch:
    """Random words in captions of real lengths, padded to 24, and random images or stored features."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [2 + n for n in rng.choices(list(LENGTHS), list(LENGTHS.values()), k=size)]
    ids = torch.full((size, MAX_TOKENS), 1)
    for row, n in zip(ids, lengths, strict=True):
        row[:n] = torch.cat(
            [torch.tensor([2]), torch.randint(4, 50000, (n - 2,), generator=generator), torch.tensor([50266])]
        )
    images = torch.randn(size, 3, *model.vision.image_size, generator=generator).to(model.device, model.vision.dtype)
    features = None if pixels else model.vision(images)
    return Batch([], [], ids.to(model.device), lengths, images if pixels else None, features)


def compiled(model: Fromage) -> Step:
    """The fast step with compiled layers, which stay as they are for everybody else."""
    compile_blocks(model.lm)
    forwards = {block: block.forward for block in model.lm.blocks}
    for block in forwards:
        del block.forward

    def step(model: Fromage, batch: Batch, paired: bool) -> StepOutput:
        for block, forward in forwards.items():
            block.forward = forward
        try:
            return fast_step(model, batch, paired)
        finally:
            for block in forwards:
                del block.forward

    return step


def peak_memory(model: Fromage, optimizer: torch.optim.Optimizer, batch: Batch, step: Callable[[], None]) -> int:
    """Bytes at the moment of most memory in a step, above weights, optimiser and batch."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - held
    given = [t for t in (batch.ids, batch.pixels, batch.features) if t is not None]
    moments = [value for state in optimizer.state.values() for value in state.values()]
    meter = Meter([*model.parameters(), *model.buffers(), *moments, *given])
    meter.run("step", step)
    return meter.passes["step"].peak


def one_step(step: Step, model: Fromage, optimizer: torch.optim.Optimizer, batch: Batch, paired: bool) -> None:
    """Losses, backward, clipping, Adam: a whole training step."""
    optimizer.zero_grad()
    step(model, batch, paired).loss.backward()
    torch.nn.utils.clip_grad_norm_(list(model.trained().values()), 1.0)
    optimizer.step()
    model.ret.rescale_()
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def gradient_error(model: Fromage, batch: Batch) -> float:
    """Largest relative difference, over trained parameters and both forms, between the two steps' gradients."""
    worst = 0.0
    for paired in (False, True):
        grads = []
        for step in (reference_step, fast_step):
            model.zero_grad()
            step(model, batch, paired).loss.backward()
            grads.append({name: p.grad.float().clone() for name, p in model.trained().items()})
        for name, want in grads[0].items():
            worst = max(worst, ((grads[1][name] - want).norm() / want.norm()).item())
    return worst


def main() -> None:
    """Read the command line, measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; one of plain, fast and stored each")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compile", action="store_true", help="time the fast step with compiled layers too")
    args = parser.parse_args()
    torch.manual_seed(0)
    preset = PRESETS[args.preset]
    model = build(preset, args.device)
    optimizer = torch.optim.Adam(list(model.trained().values()), lr=3e-4, betas=(0.9, 0.95))
    kinds: dict[str, tuple[Step, bool]] = {
        "plain": (reference_step, True),
        "fast": (fast_step, True),
        "stored features": (fast_step, False),
    }
    if args.compile:
        kinds["fast, compiled"] = (compiled(model), True)
    error = gradient_error(model, make_batch(model, preset["batch"], 0, pixels=False))
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    peaks: dict[str, float] = dict.fromkeys(kinds, 0.0)
    for turn in range(args.rounds + 1):  # the first warms up
        for name, (step, pixels) in kinds.items():
            batch = make_batch(model, preset["batch"], turn, pixels)
            began = time.perf_counter()
            one_step(step, model, optimizer, batch, paired=bool(turn % 2))
            if turn:
                seconds[name].append(time.perf_counter() - began)
    for name, (step, pixels) in kinds.items():
        batch = make_batch(model, preset["batch"], 0, pixels)
        optimizer.zero_grad()
        run = partial(one_step, step, model, optimizer, batch, paired=True)
        peaks[name] = peak_memory(model, optimizer, batch, run)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    report = {
        "preset": args.preset,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "seconds": median,
        "examples_per_second": {name: preset["batch"] / s for name, s in median.items()},
        "speedup": median["plain"] / median["fast"],
        "speedup_stored_features": median["plain"] / median["stored features"],
        "peak_memory_ratio": peaks["fast"] / peaks["plain"],
        "peak_memory_bytes": peaks,
        "max_rel_grad_error": error,
    }
    print(f"{'':16}{'s/step':>10}{'examples/s':>12}{'ratio':>8}{'peak MB':>10}")
    for name, s in median.items():
        print(f"{name:16}{s:10.3f}{preset['batch'] / s:12.1f}{median['plain'] / s:8.2f}{peaks[name] / 2**20:10.0f}")
    print(f"largest relative gradient error {error:.1e}; {report['device']}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
