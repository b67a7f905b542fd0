"""What the devices of a run have, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist

Item = TypeVar("Item")


def gathered(items: Sequence[Item]) -> list[Item]:
    """The items of all devices, in order of the devices, which may have different numbers of them.

    They travel as pickles, so tensors should be on the CPU. All devices must call it together.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(items)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, list(items))
    return [item for theirs in everyone for item in theirs]
