"""What the processor can do, as far as it decides how numbers are multiplied, and devices by name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from fromage.errors import UserError


def on_cpu(*tensors: Tensor) -> bool:
    """Whether these are plain tensors that the processor computes with; a planner's stand for those of any device."""
    return all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" for x in tensors)


@cache
def described() -> str:
    """The kernel's description of the processor on Linux; elsewhere an empty text."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


@cache
def mkl_is_slow() -> bool:
    """Whether this is a processor of AMD with AVX-512, and PyTorch has both MKL and oneDNN."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not both or torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return "AuthenticAMD" in described()


@cache
def multiplies_bfloat16() -> bool:
    """Whether a GPU, or else the processor (AVX-512 or AMX with bfloat16), multiplies numbers in bfloat16 itself."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    flags = described().split()
    return torch.backends.mkldnn.is_available() and ("avx512_bf16" in flags or "amx_bf16" in flags)


def reads_weights_slowly(rows: int, weight: Tensor) -> bool:
    """Whether a product of few rows with a weight is better cut into slices of the weight (fromage.models.cpu_linear).

    Measured on two processors of AMD: with AVX-512 always; with AVX2 by several threads alone, and for one row only where
    the weight is large (tools/bench_linear.py).
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return True
    return torch.get_num_threads() > 1 and (rows > 1 or weight.numel() >= 2**23)


def find_device(name: str) -> str:
    """A device that PyTorch can use, by name; 'auto' is the first there of cuda, mps and cpu.

    Called before towers are loaded. Raises UserError for one that cannot be used.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name}: PyTorch cannot use it here; give auto, cpu, cuda or mps") from error
    return name
