"""Linear layers on this CPU: fromage.models.cpu_linear beside PyTorch's own, with and without gradients.

    python tools/bench_linear.py
    python tools/bench_linear.py --threads 1 --json linear.json

Both take turns; a ratio is that of the medians. Shapes: rows x inputs x outputs, of the toy language model and of OPT-125m,
SmolLM2-135M, CLIP ViT-L and OPT-6.7B.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fromage.models.cpu_linear import CpuLinears
from fromage.processor import mkl_is_slow

SHAPES = [(2048, 192, 768), (512, 768, 3072), (512, 576, 1536), (257, 1024, 4096), (1, 768, 3072), (1, 4096, 4096)]


def seconds(call: Callable[[], object], least: float = 0.05) -> float:
    """Mean seconds of a call, over as many as take `least` seconds."""
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < least:
        call()
        count += 1
    return passed / count


def ways(rows: int, inputs: int, outputs: int, backward: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """A layer of PyTorch's own, and ours."""
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    slope = torch.randn(rows, outputs)

    def plain() -> None:
        with torch.set_grad_enabled(backward):
            given = [tensor.requires_grad_(backward) for tensor in (x, weight, bias)]
            y: Tensor = F.linear(*given)
            if backward:
                torch.autograd.grad(y, given, slope)

    def ours() -> None:
        with CpuLinears():
            plain()

    return plain, ours


def main() -> None:
    """Read the command line, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads; oneDNN in place of MKL: {'yes' if mkl_is_slow() else 'no'}")
    print("| rows x inputs x outputs | | plain, GFLOP/s | ours | ratio |\n|---|---|---|---|---|")
    found = []
    for shape in SHAPES:
        for backward in [False, True] if shape[0] > 1 else [False]:
            both = ways(*shape, backward)
            for call in both:
                call()
            times = [[seconds(call) for call in both] for _ in range(args.rounds)]
            plain, ours = (statistics.median(column) for column in zip(*times, strict=True))
            flop = 2 * shape[0] * shape[1] * shape[2] * (3 if backward else 1) / 1e9
            what = "with gradients" if backward else "forward"
            name = " x ".join(map(str, shape))
            print(f"| {name} | {what} | {flop / plain:.0f} | {flop / ours:.0f} | {plain / ours:.2f} |", flush=True)
            found.append({"shape": shape, "backward": backward, "plain_s": plain, "ours_s": ours, "ratio": plain / ours})
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "onednn": mkl_is_slow(), "layers": found}, indent=2))


if __name__ == "__main__":
    main()
