"""The frozen transformer layers, one by one: compiled, recomputed in the backward, or sharded over devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from fromage.models.cpu_linear import cpu_linears
from fromage.models.language_model import LanguageModel
from fromage.models.packed_attention import AppendedTokens, attending, current_attention


def compile_blocks(lm: LanguageModel) -> None:
    """Let torch.compile fuse the operations between the matrix products of each layer; attention is not compiled."""
    for block in lm.blocks:
        block.forward = torch.compile(block.forward, dynamic=True)  # type: ignore[method-assign]


def checkpoint_blocks(lm: LanguageModel) -> None:
    """Activation checkpointing (Chen et al., 2016): a layer keeps its input only and runs again in the backward."""
    for block in lm.blocks:
        block.forward = partial(_recomputed, block.forward)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
    attend = current_attention()
    last = isinstance(attend, AppendedTokens)  # few tokens, whose cache is gone by the backward
    if last or not torch.is_grad_enabled():
        return forward(*args, **named)

    def run(*args: Any, **named: Any) -> Any:
        """Again in the backward, outside of the caller's `attending`."""
        with nullcontext() if attend is None else attending(attend), cpu_linears():
            return forward(*args, **named)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **named)


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
