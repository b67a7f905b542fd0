"""What can be done to the frozen transformer layers one by one: compile them, recompute them, spread them over devices."""

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
from fromage.models.packed_attention import OneMore, attending, who_attends


def compile_blocks(lm: LanguageModel) -> None:
    """Let torch.compile fuse what stands between the matrix products of each layer; attention stays as it is."""
    for block in lm.blocks:
        block.forward = torch.compile(block.forward, dynamic=True)  # type: ignore[method-assign]


def checkpoint_blocks(lm: LanguageModel) -> None:
    """Activation checkpointing (Chen et al., 2016): a layer keeps its input alone and runs again in the backward."""
    for block in lm.blocks:
        block.forward = partial(_recomputed, lm.hf.config, block.forward)  # type: ignore[method-assign]


def _recomputed(config: Any, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
    attend = who_attends()
    if not torch.is_grad_enabled() or isinstance(attend, OneMore):  # few tokens, and what they attend to is used up
        return forward(*args, **named)

    def run(*args: Any, **named: Any) -> Any:  # the second time in the backward, where nobody has said who attends
        with nullcontext() if attend is None else attending(config, attend):
            return forward(*args, **named)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **named)


def shard_blocks(lm: LanguageModel, device_type: str) -> None:
    """FSDP: each device holds a part of each layer, which is gathered for its forward and its backward."""
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for block in lm.blocks:
        fully_shard(block, mesh=mesh)
    inside = {p for block in lm.blocks for p in block.parameters()}
    fully_shard(lm.hf.base_model, mesh=mesh, ignored_params=set(lm.hf.base_model.parameters()) - inside)


def gather_blocks(lm: LanguageModel, whole: bool) -> None:
    """Hold sharded layers whole, so that devices may run them independently of one another; or spread them again."""
    for module in (*lm.blocks, lm.hf.base_model):
        module.set_reshard_after_forward(not whole)
        module.unshard() if whole else module.reshard()
