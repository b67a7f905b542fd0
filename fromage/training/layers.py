"""The frozen transformer layers, one by one: compiled, recomputed in the backward, or sharded over devices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from fromage.models.language_model import LanguageModel
from fromage.models.packed_attention import OneMore, attending, current_attention


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
    if not torch.is_grad_enabled() or isinstance(attend, OneMore):  # few tokens, and OneMore has removed its cache
        return forward(*args, **named)

    def run(*args: Any, **named: Any) -> Any:  # again in the backward, outside of the caller's `attending`
        with nullcontext() if attend is None else attending(attend):
            return forward(*args, **named)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **named)


def shard_blocks(lm: LanguageModel, device_type: str) -> None:
    """FSDP: each device holds a part of each layer; a layer is gathered for its forward and its backward."""
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for block in lm.blocks:
        fully_shard(block, mesh=mesh)
    inside = {p for block in lm.blocks for p in block.parameters()}
    fully_shard(lm.hf.base_model, mesh=mesh, ignored_params=set(lm.hf.base_model.parameters()) - inside)


def gather_blocks(lm: LanguageModel, whole: bool) -> None:
    """Gather sharded layers (whole=True), so that devices can run them independently; or shard them again."""
    for module in (*lm.blocks, lm.hf.base_model):
        module.set_reshard_after_forward(not whole)
        module.unshard() if whole else module.reshard()
