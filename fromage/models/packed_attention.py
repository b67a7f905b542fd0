"""Sequences of unequal length laid end to end: everything but attention runs on N tokens without padding.

A Hugging Face model asks a registered function for its attention. Ours spreads the packed queries, keys and values over
(S, T) padded rows, where causal attention needs no mask since padding is behind, and gathers the answer back.

Shapes: S sequences, T tokens of the longest, N tokens of all, H heads, e width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from fromage.errors import UserError

NAME = "fromage_packed"


def starts(lengths: list[int]) -> list[int]:
    """Where each of some sequences laid end to end begins."""
    return [0, *accumulate(lengths)][:-1]


def to_device(values: Any, device: torch.device) -> Tensor:
    """Whole numbers or a tensor, known on the host -> there, without waiting for the device."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.long)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class Rows:
    """Where the tokens of sequences stand, packed and padded. Laid out on the host: no question to the device."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        """lengths: tokens of each sequence, at least one."""
        self.count, self.width = len(lengths), max(lengths)
        positions = [t for n in lengths for t in range(n)]
        flat = [s * self.width + t for s, n in enumerate(lengths) for t in range(n)]
        self.positions, self.flat = to_device([positions, flat], device)  # (N,) within its sequence; (N,) among S T places
        self.starts = starts(lengths)

    def spread(self, packed: Tensor) -> Tensor:
        """(N, ...) -> (S, T, ...), zeros behind each sequence."""
        return _Spread.apply(packed, self.flat, self.count * self.width).unflatten(0, (self.count, self.width))

    def gather(self, padded: Tensor) -> Tensor:
        """(S, T, ...) -> (N, ...)."""
        return _Gather.apply(padded.flatten(0, 1), self.flat)


class _Spread(torch.autograd.Function):
    """Each place is written once, so that spread and gather are each other's gradient, without accumulation."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, flat: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(flat)
        return packed.new_zeros(places, *packed.shape[1:]).index_copy_(0, flat, packed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, flat: Tensor) -> Tensor:
        ctx.save_for_backward(flat)
        ctx.places = len(padded)
        return padded.index_select(0, flat)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.new_zeros(ctx.places, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None


class Attend(Protocol):
    """How the packed tokens of one forward pass attend, layer by layer.

    Attributes:
        reach: tokens of the longest sequence, those of an earlier pass included.
    """

    reach: int

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, weighting: Weighting) -> Tensor:
        """q (N, H, e), k and v (N, H', e) with H' <= H -> (N, H, e)."""


class Weighting(NamedTuple):
    """What a layer does to the products of queries and keys: a factor, and a bound that tanh keeps them within (Gemma 2)."""

    scale: float | None
    cap: float | None

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q (S, H, T, e), k and v (S, H', T', e), mask of who sees whom, None if causal -> (S, H, T, e)."""
        grouped = q.shape[1] != k.shape[1]
        if self.cap is None:
            causal = mask is None
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale, enable_gqa=grouped)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # (S, H, T', e)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril() if mask is None else mask
        products = (q @ k.transpose(2, 3)).float() * (self.scale or q.shape[3] ** -0.5)  # (S, H, T, T')
        capped = (torch.tanh(products / self.cap) * self.cap).masked_fill(~mask, -torch.inf)
        return capped.softmax(-1).to(v.dtype) @ v


class Causal:
    """Each token attends to those before it in its sequence. With keep, keys and values stay for OneMore."""

    def __init__(self, rows: Rows, keep: bool = False) -> None:
        self.rows, self.keep, self.reach = rows, keep, rows.width
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values (S, H', T, e)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, weighting: Weighting) -> Tensor:
        """See Attend."""
        q, k, v = (self.rows.spread(x).transpose(1, 2) for x in (q, k, v))  # (S, H, T, e)
        if self.keep:
            self.kept[layer] = k, v
        return self.rows.gather(weighting.attention(q, k, v, None).transpose(1, 2))  # (S, T, H, e) -> (N, H, e)


class OneMore:
    """One new token behind each of S sequences, whose keys and values an earlier pass kept: they are used up."""

    def __init__(self, before: Causal, lengths: list[int], device: torch.device) -> None:
        self.kept, self.reach = before.kept, before.rows.width + 1
        known = torch.arange(before.rows.width).expand(len(lengths), -1) < torch.tensor(lengths).unsqueeze(1)  # (S, T)
        mask = F.pad(known, (0, 1), value=True)[:, None, None]  # (S, 1, 1, T + 1)
        self.mask = to_device(mask, device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, weighting: Weighting) -> Tensor:
        """See Attend; here N = S."""
        q, k, v = (x.unsqueeze(2) for x in (q, k, v))  # (S, H, 1, e)
        keys, values = (torch.cat([old, new], 2) for old, new in zip(self.kept.pop(layer), (k, v), strict=True))
        return weighting.attention(q, keys, values, self.mask).squeeze(2)


class Branches:
    """Sequences that go on from one prefix, whose keys and values an earlier pass over it alone kept.

    One attention over prefix and all N tokens: each sees the prefix, and its own sequence up to itself.
    """

    def __init__(self, prefix: Causal, lengths: list[int], device: torch.device) -> None:
        self.kept, self.reach = prefix.kept, prefix.rows.width + max(lengths)
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # (N,)
        own = (owner[:, None] == owner).tril()  # (N, N)
        self.mask = to_device(F.pad(own, (prefix.rows.width, 0), value=True), device)  # (N, P + N), P tokens in the prefix

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, weighting: Weighting) -> Tensor:
        """See Attend."""
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, H, N, e)
        keys, values = (torch.cat([old, new], 2) for old, new in zip(self.kept[layer], (k, v), strict=True))
        return weighting.attention(q, keys, values, self.mask)[0].transpose(0, 1)  # (1, H, N, e) -> (N, H, e)


_attend: ContextVar[Attend | None] = ContextVar("attend", default=None)


def who_attends() -> Attend | None:
    """How the tokens attend within `attending`; None outside, where Hugging Face's own attention runs."""
    return _attend.get()


@torch.compiler.disable
def _attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    """What Hugging Face calls: q (1, H, N, e), k and v (1, H', N, e) -> (1, N, H, e)."""
    attend: Any = who_attends()
    window = options.get("sliding_window")
    if window is not None and attend.reach > window:
        raise UserError(f"{attend.reach} tokens in a sequence: this language model looks back {window} only; shorten it")
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (N, H, e)
    out = attend(module.layer_idx, q, k, v, Weighting(options.get("scaling"), options.get("softcap")))
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *args, **options: None)


@contextmanager
def attending(config: Any, attend: Attend) -> Iterator[None]:
    """Let a Hugging Face model of this configuration attend so, for the calls within."""
    before, token = config._attn_implementation, _attend.set(attend)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _attend.reset(token)
