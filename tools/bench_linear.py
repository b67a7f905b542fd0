"""Linear layers on this CPU: fromage.models.cpu_linear beside PyTorch's own, with and without gradients.

    python tools/bench_linear.py
    python tools/bench_linear.py --threads 1 --json linear.json

All take turns; a ratio is that of the medians. Few rows are timed with weights in float16 too (Decoding.half_weights).
Shapes: rows x inputs x outputs, of the toy language model and of OPT-125m, SmolLM2-135M, CLIP ViT-L and OPT-6.7B.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fromage.io import write_json
from fromage.models.cpu_linear import FEW_HALVES, cpu_linear, halves_of
from fromage.processor import mkl_is_slow

SHAPES = [(2048, 192, 768), (512, 768, 3072), (512, 576, 1536), (257, 1024, 4096)]
SHAPES += [(1, 768, 3072), (4, 768, 3072), (1, 768, 50272), (4, 768, 50272), (1, 4096, 4096)]


def seconds(call: Callable[[], object], least: float = 0.05) -> float:
    """Mean seconds of a call, over as many as take `least` seconds."""
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < least:
        call()
        count += 1
    return passed / count


def ways(rows: int, inputs: int, outputs: int, backward: bool) -> dict[str, Callable[[], None]]:
    """A layer of PyTorch's own, ours, and where rows are few ours with weights in float16."""
    x, layer = torch.randn(rows, inputs), nn.Linear(inputs, outputs)
    slope = torch.randn(rows, outputs)

    def run(linear: Callable[..., Tensor]) -> None:
        with torch.set_grad_enabled(backward):
            given = [tensor.detach().requires_grad_(backward) for tensor in (x, layer.weight, layer.bias)]
            y = linear(*given)
            if backward:
                torch.autograd.grad(y, given, slope)

    packed = halves_of(layer) if rows <= FEW_HALVES and not backward else {}
    halved = partial(cpu_linear, halved=packed.get(id(layer.weight)))
    calls = {"plain": F.linear, "ours": cpu_linear} | ({"float16": halved} if packed else {})
    return {name: partial(run, call) for name, call in calls.items()}


def main() -> None:
    """Read the command line, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads; oneDNN in place of MKL: {'yes' if mkl_is_slow() else 'no'}")
    print("| rows x inputs x outputs | | plain, GFLOP/s | ours | ratio | float16 | ratio |\n|---|---|---|---|---|---|---|")
    found = []
    for shape in SHAPES:
        for backward in [False, True] if shape[0] > FEW_HALVES else [False]:
            calls = ways(*shape, backward)
            for call in calls.values():
                call()
            times = [[seconds(call) for call in calls.values()] for _ in range(args.rounds)]
            taken = dict(zip(calls, map(statistics.median, zip(*times, strict=True)), strict=True))
            flop = 2 * shape[0] * shape[1] * shape[2] * (3 if backward else 1) / 1e9
            cells = [
                " x ".join(map(str, shape)),
                "with gradients" if backward else "forward",
                f"{flop / taken['plain']:.0f}",
            ]
            for way in ("ours", "float16"):
                known = taken.get(way)
                cells += [f"{flop / known:.0f}", f"{taken['plain'] / known:.2f}"] if known else ["", ""]
            print(f"| {' | '.join(cells)} |", flush=True)
            figures = {f"{way}_s": value for way, value in taken.items()}
            found.append({"shape": shape, "backward": backward, **figures, "ratio": taken["plain"] / taken["ours"]})
    if args.json:
        write_json(args.json, {"threads": args.threads, "onednn": mkl_is_slow(), "layers": found})


if __name__ == "__main__":
    main()
