"""One training step of each stage of Octopus on random weights: seconds, and memory above the weights.

    python tools/bench_octopus.py                                # 12-layer OPT 768 wide, ViT-B/32
    python tools/bench_octopus.py --preset paper --device cuda   # LLaMA-7B's and CLIP ViT-L/14-336's sizes, bfloat16

Stage 1 trains the visual prefix, stage 2 queries, DETR decoder and index tokens, stage 3 these and adapters of low rank in
the language model. Patch features are given, as from a store. A stage that does not fit is said so.

Beside them, by turns in one run: a step of stage 2 on ROW examples that share a row (data.per_image), and on the same
examples in rows of their own.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_generate import seconds_of
from bench_grounding import ASKED, PRESETS, QUERIES, build
from on_device import Save, device_name, elapsed, keep_nothing

from fromage.io import write_json
from fromage.octopus.collate import Collate
from fromage.octopus.examples import Example
from fromage.octopus.lora import add_lora
from fromage.octopus.model import Octopus
from fromage.octopus.module import choose_trained
from fromage.octopus.step import GroundingBatch, octopus_step

STAGES = {"1": 0, "2": 0, "3": 64}  # stage: rank of its adapters
BATCH = {"paper": 4, "cpu": 4, "tiny": 2}
ROW = 8  # examples about one image, as in octopus_stage2.yaml
OBJECTS = 5  # known ones of an image, of which the answer points at two
OUT_OF_MEMORY = "out of memory"


def lesson(model: Octopus, size: int, asks: bool, per_image: int = 1) -> GroundingBatch:
    """Random patch features and made-up objects, on the model's device; without queries, a caption is the answer.

    size: examples, per_image of them in a row; all are about the same image.
    """
    generator = torch.Generator(model.device).manual_seed(0)
    patches = torch.randn(model.vision.shape, generator=generator, device=model.device).cpu()  # (P, m)
    boxes = tuple((i / 10, 0.1, i / 10 + 0.3, 0.6) for i in range(OBJECTS))
    answer = ("the star ", 0, " and the ring ", 1) if asks else ("a small star left of the big red ring",)
    examples = [Example(f"{i}", "", ASKED, answer, boxes if asks else ()) for i in range(size)]
    rows = [[[example] for example in examples[start : start + per_image]] for start in range(0, size, per_image)]
    return Collate(model, stored=True, ask=asks)([(row, patches) for row in rows]).to(model.device)


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
    step = partial(train, model, batch, optimizer)
    gpu = model.device.type == "cuda"
    times = [elapsed(step, model.device) for _ in range(1 + rounds)]
    optimizer.zero_grad()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if gpu else 0
    step()
    peak = torch.cuda.max_memory_allocated() - held if gpu else None
    many, tokens = sum(p.numel() for p in trained), (len(batch.prompts.ids) + len(batch.fed.ids)) // size
    return {"seconds": statistics.median(times[1:]), "peak_memory_bytes": peak, "trained": many, "tokens": tokens}


def train(model: Octopus, batch: GroundingBatch, optimizer: torch.optim.Optimizer) -> None:
    """One step."""
    optimizer.zero_grad()
    octopus_step(model, batch).loss.backward()
    optimizer.step()


def rows(model: Octopus, rounds: int) -> dict[str, Any]:
    """Median seconds of a step of stage 2 on ROW examples, in one row and in rows of their own, and how they compare."""
    optimizer = torch.optim.AdamW(prepared(model, 2, 0), lr=1e-5, fused=True)
    batches = {"together": lesson(model, ROW, True, per_image=ROW), "alone": lesson(model, ROW, True)}
    calls = {name: partial(train, model, batch, optimizer) for name, batch in batches.items()}
    taken = seconds_of(calls, rounds, model.device)
    tokens = {name: len(batch.prompts.ids) + len(batch.fed.ids) for name, batch in batches.items()}
    return {"examples": ROW, "seconds": taken, "tokens": tokens, "ratio": round(taken["alone"] / taken["together"], 2)}


def measure(preset: str, device: str, rounds: int, save: Save = keep_nothing) -> dict[str, Any]:
    """Every stage by its number; save is given the figures after each."""
    torch.manual_seed(0)
    model = build(PRESETS[preset], QUERIES, device)
    report: dict[str, Any] = {"preset": preset, "device": device_name(device), "batch": BATCH[preset], "stages": {}}
    for stage, rank in STAGES.items():
        report["stages"][stage] = or_too_large(lambda s=stage, r=rank: one_stage(model, int(s), r, BATCH[preset], rounds))
        save(report)
        if stage == "2":
            report["rows"] = or_too_large(lambda: rows(model, rounds))
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


def compared(found: dict[str, Any]) -> str:
    """The figures of `rows` as a line."""
    ours, theirs = (1000 * found["seconds"][name] / found["examples"] for name in ("together", "alone"))
    many, few = (found["tokens"][name] for name in ("alone", "together"))
    told = f"{ours:.1f} ms an example, in rows of their own {theirs:.1f} ms, {found['ratio']:.2f} times as long"
    return f"{told} ({few:,} and {many:,} tokens of {found['examples']} examples)"


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
    print("rows of examples that share an image: " + (report["rows"].get("failed") or compared(report["rows"])))
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
