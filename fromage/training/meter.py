"""FLOP and memory of PyTorch calls, counted operation by operation, on real or fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def _every_head(flop: Callable[..., int], first: int) -> Callable[..., int]:
    """Count an attention whose heads share keys and values, which PyTorch up to 2.11 refuses, as if each had its own.

    first: which argument the queries are; keys and values follow.
    """

    def count(*args: Any, **named: Any) -> int:
        q, k, v = args[first : first + 3]  # (S, H, T, e), and two (S, H', T', e)
        k, v = (x[:, :1].expand(-1, q.shape[1], -1, -1) for x in (k, v))  # (S, H, T', e)
        return flop(*args[:first], q, k, v, *args[first + 3 :], **named)

    return count


def _linear(x: Tensor, weight: Tensor, *_: Any, **named: Any) -> int:
    """Of (..., K), (N, K) -> (..., N)."""
    return 2 * x.numel() * len(weight)


_aten: Any = torch.ops.aten
FLOP: dict[Any, Callable[..., int]] = {  # two per multiply-add of a matrix product, convolution or attention
    **flop_registry,
    getattr(torch.ops.mkldnn, "_linear_pointwise", None): _linear,  # of models.cpu_linear, where PyTorch has it
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}
FLOP |= {
    op: _every_head(flop, 1 if "backward" in str(op) else 0)
    for op, flop in FLOP.items()
    if "_scaled_dot_product_" in str(op)
}


PART_BEGINS: Any = torch.ops.profiler._record_function_enter_new.default  # of torch.profiler.record_function


@dataclass
class Pass:
    """FLOP and memory, in bytes, of one call, or of a part of it.

    Attributes:
        before: live bytes at its start.
        peak: maximum of live bytes while it ran.
        kept: bytes kept for the backward, without those kept by earlier calls, by class of the module that keeps them.
    """

    flop: int
    before: int
    peak: int
    kept: dict[str, int]

    @property
    def transient(self) -> int:
        """Bytes needed beyond those kept."""
        return max(0, self.peak - self.before - sum(self.kept.values()))


class Meter(TorchDispatchMode):
    """Counts FLOP and live bytes; tensors in `held` are not counted."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.flop = self.live = 0
        self.passes: dict[str, Pass] = {}
        self.by_parts = False
        self._begin()
        self.storages: dict[int, Any] = {}
        for tensor in held:
            self._see(tensor, counted=False)
        self.held = set(self.storages)  # plus storages kept for a backward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is PART_BEGINS and self.by_parts:
            self._begin()
            self.passes[args[0]] = self.now
        if func is torch.ops.prim.device.default:
            return out
        if func.overloadpacket in FLOP:
            flop = FLOP[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            self.flop += flop
            self.now.flop += flop
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        self.now.peak = max(self.now.peak, self.live)
        return out

    def _see(self, tensor: Tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counted else 0
        if key in self.storages:
            return

        def gone(_: Any) -> None:
            self.live -= size
            del self.storages[key]

        self.live += size
        self.storages[key] = weakref.ref(storage, gone)

    def run(self, name: str | None, call: Callable[[], Any]) -> Any:
        """Run a call and store its counts in `passes` under a name.

        name: None makes a pass of each part that torch.profiler.record_function names, until the next one begins. Each name
        stands for one part; what comes before the first is in none.
        """
        self.by_parts = name is None
        self._begin()
        if name is not None:
            self.passes[name] = self.now
        with _running_modules() as stack:

            def keep(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.held:
                    self.held.add(storage._cdata)
                    self.now.kept[stack[-1]] = self.now.kept.get(stack[-1], 0) + storage.nbytes()
                return tensor

            with saved_tensors_hooks(keep, lambda tensor: tensor), self:
                out = call()
        return out

    def _begin(self) -> None:
        self.now = Pass(0, self.live, self.live, {})  # of what runs


@contextmanager
def _running_modules() -> Iterator[list[str]]:
    """The classes of the modules that are running, the innermost last."""
    stack = ["the rest"]

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(type(module).__name__)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        stack.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def attention_in_parts() -> Iterator[None]:
    """Within, torch.nn's attention runs as several operations; its fast path is one, which hides its work and memory."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
