"""What a training run needs, whatever the model: parameters, memory by what holds it, work of each pass.

A step's FLOP and memory are counted by training.meter; what a device holds in every moment follows from the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fromage.training.meter import Pass

LM, TOWER = "language model", "vision tower"


@dataclass
class Plan:
    """Counts of parameters by part, bytes, and FLOP per step, of one device.

    Attributes:
        run: the run, a dataclass of its options.
        heading: the run in words.
        examples: of a step on each device.
        max_steps: steps of the run; below 1: unknown.
        trained: number of trained parameters.
        devices: how many there are.
    """

    run: Any
    heading: str
    examples: int
    max_steps: int
    parameters: dict[str, int]
    trained: int
    trained_bytes: int
    weights: dict[str, int]  # bytes by part, wherever they are held
    held: dict[str, int]  # bytes on a device at all times, by what they are
    batch: int  # bytes
    transient: dict[str, int]  # bytes of large tensors that no backward needs; included in the passes
    beside: dict[str, int]  # bytes of weights in another form while they are used: dequantised, or gathered from devices
    passes: dict[str, Pass]
    devices: int = 1

    @property
    def activations(self) -> dict[str, int]:
        """Bytes kept for the backward, by pass."""
        return {name: sum(p.kept.values()) for name, p in self.passes.items() if p.kept}

    @property
    def peak(self) -> dict[str, int]:
        """Bytes at the peak of memory, by part."""
        names = list(self.passes)
        last = max(names, key=lambda name: self.passes[name].peak)
        kept = {name: n for name, n in self.activations.items() if names.index(name) <= names.index(last)}
        return {
            **self.held,
            "batch": self.batch,
            **{f"kept by {name}": n for name, n in kept.items()},
            f"transient in {last}": self.passes[last].peak - sum(kept.values()),
            **self.beside,
        }

    @property
    def flop(self) -> int:
        """FLOP of a step, two per multiply-add."""
        return sum(p.flop for p in self.passes.values())

    def seconds(self, tflops: float) -> float:
        """Time of a step, in seconds, at a sustained rate in TFLOP/s."""
        return self.flop / (tflops * 1e12)


def of_training(weights: int) -> dict[str, int]:
    """Bytes of trained parameters -> with those of their gradients and of AdamW's two moments, in the same dtype."""
    return {"trained parameters": weights, "their gradients": weights, "their Adam moments": 2 * weights}


def quantized_bytes(weight: Tensor, kind: str | None) -> int:
    """Bytes of a weight in bitsandbytes' format: int8 with a float32 scale per row, or NF4 with a byte per block of 64 and
    a float32 scale per 256 blocks (Dettmers et al., "QLoRA", 2023, section 3)."""
    n = weight.numel()
    return n + 4 * weight.shape[0] if kind == "int8" else n // 2 + n // 64 + 4 * (n // (64 * 256))
