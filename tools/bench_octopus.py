"""One training step of each stage of Octopus on random weights: seconds, and memory above the weights.

    python tools/bench_octopus.py                                # 12-layer OPT 768 wide, ViT-B/32
    python tools/bench_octopus.py --preset paper --device cuda   # LLaMA-7B's and CLIP ViT-L/14-336's sizes, bfloat16

Stage 1 trains the visual prefix, stage 2 queries, recogniser, pointer and index tokens, stage 3 these and adapters of low
rank in the language model. Patch features are given, as from a store. A stage that does not fit is said so.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_grounding import ASKED, PRESETS, QUERIES, build
from on_device import Save, device_name, elapsed, keep_nothing

from fromage.octopus.data import Collate
from fromage.octopus.examples import Example
from fromage.octopus.lora import add_lora
from fromage.octopus.model import Octopus
from fromage.octopus.module import choose_trained
from fromage.octopus.step import GroundingBatch, octopus_step

STAGES = {"1": 0, "2": 0, "3": 64}  # stage: rank of its adapters
BATCH = {"paper": 4, "cpu": 4, "tiny": 2}
OBJECTS = 5  # known ones of an image, of which the answer points at two
OUT_OF_MEMORY = "out of memory"


def lesson(model: Octopus, size: int, asks: bool) -> GroundingBatch:
    """Random patch features and made-up objects, on the model's device; without queries, a caption is the answer."""
    generator = torch.Generator(model.device).manual_seed(0)
    patches = torch.randn(size, *model.vision.shape, generator=generator, device=model.device)  # (B, P, m)
    boxes = tuple((i / 10, 0.1, i / 10 + 0.3, 0.6) for i in range(OBJECTS))
    answer = ("the star ", 0, " and the ring ", 1) if asks else ("a small star left of the big red ring",)
    examples = [Example(f"{i}", "", ASKED, answer, boxes if asks else ()) for i in range(size)]
    batch = Collate(model, stored=True, ask=asks)([([[e]], p) for e, p in zip(examples, patches.cpu(), strict=True)])
    return batch.to(model.device)


def prepared(model: Octopus, stage: int, rank: int) -> list[torch.nn.Parameter]:
    """Freeze what the stage does not train; returns what it does."""
    if rank:
        add_lora(model.lm, rank)
        model.lm.to(model.device)
    choose_trained(model, stage, whole=not rank)
    return [p for p in model.parameters() if p.requires_grad]


def one_stage(model: Octopus, stage: int, rank: int, size: int, rounds: int) -> dict[str, Any]:
    """Median seconds of a step, warmed up, and the peak above weights and optimiser in bytes (None on a CPU)."""
    trained, batch = prepared(model, stage, rank), lesson(model, size, stage > 1)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        octopus_step(model, batch).loss.backward()
        optimizer.step()

    gpu = model.device.type == "cuda"
    times = [elapsed(step, model.device) for _ in range(1 + rounds)]
    optimizer.zero_grad()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if gpu else 0
    step()
    peak = torch.cuda.max_memory_allocated() - held if gpu else None
    many, tokens = sum(p.numel() for p in trained), batch.ids.shape[1] + batch.answers.shape[1]
    return {"seconds": statistics.median(times[1:]), "peak_memory_bytes": peak, "trained": many, "tokens": tokens}


def measure(preset: str, device: str, rounds: int, save: Save = keep_nothing) -> dict[str, Any]:
    """Every stage by its number; save is given the figures after each."""
    torch.manual_seed(0)
    model = build(PRESETS[preset], QUERIES, device)
    report: dict[str, Any] = {"preset": preset, "device": device_name(device), "batch": BATCH[preset], "stages": {}}
    for stage, rank in STAGES.items():
        report["stages"][stage] = or_too_large(lambda s=stage, r=rank: one_stage(model, int(s), r, BATCH[preset], rounds))
        save(report)
    return report


def or_too_large(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the call returns; or that it does not fit, and then the card's memory is free again."""
    try:
        return call()
    except torch.OutOfMemoryError:
        pass  # outside of this block, the error no longer holds the tensors
    torch.cuda.empty_cache()
    return {"failed": OUT_OF_MEMORY}


def main(words: list[str] | None = None) -> None:
    """Read the command line, measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each stage, after one that warms up")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    report = measure(args.preset, args.device, args.rounds)
    for stage, found in report["stages"].items():
        print(f"stage {stage}: " + (found.get("failed") or f"{found['seconds']:.3f} s, {found['trained']:,} trained"))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
