"""The frozen transformer layers, one by one: compiled, recomputed in the backward, or sharded over devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from fromage.models.cpu_linear import cpu_linears
from fromage.models.language_model import LanguageModel
from fromage.models.packed_attention import More, attending, current_attention


def compile_blocks(lm: LanguageModel) -> None:
    """Let torch.compile fuse the operations between the matrix products of each layer; attention is not compiled."""
    for block in lm.blocks:
        block.forward = torch.compile(block.forward, dynamic=True)  # type: ignore[method-assign]


def checkpoint_blocks(lm: LanguageModel) -> None:
    """Activation checkpointing (Chen et al., 2016): a layer keeps its input only and runs again in the backward."""
    for number, block in enumerate(lm.blocks):
        block.forward = partial(_recomputed, block.forward, number)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any], number: int, *args: Any, **named: Any) -> Any:
    attend = current_attention()
    if not torch.is_grad_enabled() or isinstance(attend, More):  # few tokens, and More has removed its cache
        return forward(*args, **named)

    cached = {name: value for name, value in named.items() if isinstance(value, Cache)}
    cache = next(iter(cached.values()), None)

    def run(past: tuple[Tensor, Tensor] | None, *args: Any, **named: Any) -> Any:
        """Again in the backward, outside of the caller's `attending`, and on the keys and values of the first time."""
        layer = _LayerCache(past)
        with nullcontext() if attend is None else attending(attend), cpu_linears():
            return forward(*args, **named, **dict.fromkeys(cached, layer)), layer.states

    layers: Any = [] if cache is None else cache.layers
    past = (layers[number].keys, layers[number].values) if number < len(layers) else None
    rest = {name: value for name, value in named.items() if name not in cached}
    out, states = checkpoint(run, past, *args, use_reentrant=False, preserve_rng_state=False, **rest)
    if cache is not None and past is None:
        cache.update(*states, number)
    elif cache is not None:
        layers[number].keys, layers[number].values = states
    return out


class _LayerCache:
    """The keys and values of one layer, in place of the cache: running the layer again does not make it grow again."""

    def __init__(self, states: tuple[Tensor, Tensor] | None) -> None:
        self.states = states

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """New keys and values, (B, H, A, e) each -> those of all tokens, (B, H, S + A, e) each."""
        if self.states is not None:
            keys, values = (torch.cat(pair, -2) for pair in zip(self.states, (keys, values), strict=True))
        self.states = keys, values
        return self.states


def shard_blocks(lm: LanguageModel, device_type: str) -> None:
    """FSDP: each device holds a part of each layer; a layer is gathered for its forward and its backward."""
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for block in lm.blocks:
        fully_shard(block, mesh=mesh)
    inside = {p for block in lm.blocks for p in block.parameters()}
    fully_shard(lm.hf.base_model, mesh=mesh, ignored_params=set(lm.hf.base_model.parameters()) - inside)


def shard_all(
    module: nn.Module, lm: LanguageModel, device_type: str, steps: Iterable[str], dtype: torch.dtype | None = None
) -> None:
    """FSDP of a module that trains its language model: each device holds a part of every parameter, gradient and moment.

    A layer of the language model is gathered while it runs; trained parameters outside of the layers are one group, gathered
    for a whole step. Frozen parameters outside of the layers stay whole. steps: methods of the module that run it. dtype: of
    the gathered layers and what they compute; gradients are summed in float32.
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for block in lm.blocks:
        outer = lm.dtype if block is lm.blocks[-1] else None  # of what runs after the last layer
        policy = MixedPrecisionPolicy(dtype, torch.float32, outer) if dtype else MixedPrecisionPolicy()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    inside = {p for block in lm.blocks for p in block.parameters()}
    fully_shard(module, mesh=mesh, ignored_params={p for p in module.parameters() if not p.requires_grad} - inside)
    for step in steps:
        register_fsdp_forward_method(module, step)


def gather_blocks(lm: LanguageModel, whole: bool) -> None:
    """Gather sharded layers (whole=True), so that devices can run them independently; or shard them again."""
    for module in (*lm.blocks, lm.hf.base_model):
        module.set_reshard_after_forward(not whole)
        module.unshard() if whole else module.reshard()
