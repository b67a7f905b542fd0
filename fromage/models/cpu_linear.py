"""Faster linear layers on a CPU in float32, for models that are not changed by it.

few rows, no gradient   the tokens of a single answer: all weights are read for each, which BLAS does on one core, far
                        below the bandwidth of the memory; as a batch of products of slices of W with x^T it is up to
                        twice as fast, and uses all cores; on some processors only (reads_weights_slowly)
few rows, in halves     the same, for those who ask for it: weights that are read in float16 are half as many bytes. Values
                        differ by 2e-4 of their size, so tokens may change
many rows, on AMD       MKL, PyTorch's BLAS, has no AVX-512 kernels for AMD's processors; oneDNN has, and is about twice
                        as fast

tools/bench_linear.py measures both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fromage.processor import mkl_is_slow, on_cpu, reads_weights_slowly

FEW_ROWS = 4  # up to which slices are faster
SLICES = 8
FEW_HALVES = 16  # rows up to which weights in float16 are faster
MANY_ROWS, MANY_PRODUCTS = 32, 2**20  # from which oneDNN is faster


Halves = Mapping[int, Any]  # by the id of a weight: its values in float16, as FBGEMM packs them
_halves: WeakKeyDictionary[nn.Module, Halves] = WeakKeyDictionary()


def cpu_linears() -> AbstractContextManager[object]:
    """A context in which this thread's F.linear, which nn.Linear calls, is cpu_linear, where many rows gain by that."""
    return _CpuLinears() if mkl_is_slow() else nullcontext()


class _CpuLinears(TorchFunctionMode):
    """PyTorch calls it for each of its functions: microseconds each, which a pass over many rows does not notice."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (cpu_linear if func is F.linear else func)(*args, **(kwargs or {}))


class CpuLinear(nn.Linear):
    """A linear layer that is computed by cpu_linear. halved: its weight in float16, or None."""

    halved: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return cpu_linear(x, self.weight, self.bias, self.halved)


def with_cpu_linears(model: nn.Module, halves: Halves | None = None) -> nn.Module:
    """A second object for a model, whose linear layers are CpuLinear: for answers, whose tokens are few rows each.

    Parameters, buffers and hooks are the model's own; the model is not changed. Any other attribute that a forward
    pass sets is set on the second object alone. Making it takes a few milliseconds.
    halves: see halves_of.
    """
    seen: dict[nn.Module, nn.Module] = {}

    def second(module: nn.Module) -> nn.Module:
        if module not in seen:
            kind = CpuLinear if type(module) is nn.Linear else type(module)
            seen[module] = twin = object.__new__(kind)  # that of FSDP2 would begin the layer anew
            children = {name: child and second(child) for name, child in module._modules.items()}
            vars(twin).update(vars(module), _modules=children)
            if isinstance(twin, CpuLinear) and halves:
                twin.halved = halves.get(id(twin.weight))
        return seen[module]

    return second(model)


def halves_of(model: nn.Module) -> Halves:
    """The weights of all linear layers of a frozen model in float16; made once, and kept as long as the model.

    Empty where PyTorch has no such kernel for this processor; those that are not float32 on the CPU are left out.
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines or not hasattr(torch.ops.quantized, "linear_prepack_fp16"):
        return {}
    if model not in _halves:
        layers = [each.weight for each in model.modules() if isinstance(each, nn.Linear)]
        pack = torch.ops.quantized.linear_prepack_fp16
        _halves[model] = {id(w): pack(w.detach(), None) for w in layers if on_cpu(w) and w.dtype == torch.float32}
    return _halves[model]


def cpu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, halved: Any = None) -> Tensor:
    """F.linear, (..., K) -> (..., N), by the fastest way that there is for its arguments. halved: see CpuLinear."""
    rows = x.numel() // max(weight.shape[-1], 1)
    if halved is not None and x.dtype == torch.float32 and 0 < rows <= FEW_HALVES and not torch.is_grad_enabled():
        y = torch.ops.quantized.linear_dynamic_fp16(x.reshape(rows, -1), halved)  # (r, N)
        return (y if bias is None else y.add_(bias)).reshape(*x.shape[:-1], -1)
    if not on_cpu(x, weight) or not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if 0 < rows <= FEW_ROWS and not (torch.is_grad_enabled() or len(weight) % SLICES) and weight.is_contiguous():
        return (_sliced if reads_weights_slowly(rows, weight) else F.linear)(x, weight, bias)
    if rows >= MANY_ROWS and rows * weight.numel() >= MANY_PRODUCTS and mkl_is_slow():
        return _OneDnn.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _sliced(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A batch of products of slices of W with x^T."""
    columns, rows = weight.shape[-1], x.numel() // weight.shape[-1]
    slices = weight.view(SLICES, -1, columns)  # (s, N / s, K)
    y = torch.bmm(slices, x.reshape(rows, -1).T.expand(SLICES, -1, -1))  # (s, N / s, r)
    y = y.flatten(0, 1).T  # (r, N)
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], -1)


class _OneDnn(torch.autograd.Function):
    """x W^T + b, and its gradients: each a product by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad  # a frozen layer keeps its weight alone, which is there anyway
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        return _product(x, weight, bias)  # (..., K), (N, K) -> (..., N)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), (for_x, for_weight, for_bias) = ctx.saved_tensors, ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # (r, N)
        return (
            _product(grad, weight.T) if for_x else None,  # (..., K)
            _product(rows.T, x.reshape(-1, x.shape[-1]).T) if for_weight else None,  # (N, K)
            rows.sum(0) if for_bias else None,  # (N,)
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., K), (N, K) -> (..., N)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
