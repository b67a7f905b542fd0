"""Packed sequences: sequences of unequal length laid end to end, so that only attention computes padding.

A Hugging Face model calls a registered function for its attention. Ours stands in front of the model's own (`route`)
and asks in each call whether this thread runs packed sequences (`attending`); if not, the model's own answers, so that
one thread can decode while another scores. For packed sequences ours pads queries, keys and values to (S, T), computes
causal attention (the padding comes last, so no mask is needed) and removes the padding again. What the tokens attend to
is a PackedAttention: CausalAttention; AppendedTokens, r new ones after cached ones (the one-token backward);
Continuations of one prefix; or MaskedAttention, whose mask the caller gives (Octopus).

The layout of the sequences is in fromage.models.packed_layout.

Shapes: see fromage.models. Here N counts the tokens of all sequences and T those of the longest.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from fromage.models.packed_layout import PackedLayout, distances, to_device
from fromage.processor import on_cpu

PREFIX = "fromage_packed_or_"  # before the name of the attention that a model was loaded with


class PackedAttention:
    """Attention of the packed tokens of one forward pass, called by each layer.

    Attributes:
        layers: numbers of the layers that have called it.
    """

    def __init__(self) -> None:
        self.layers = set[int]()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """q (N, H, e), k and v (N, H', e) with H' <= H -> (N, H, e)."""
        raise NotImplementedError


class AttentionParams(NamedTuple):
    """How a layer turns products of queries and keys into weights.

    Attributes:
        scale: factor on the products; None: 1 / sqrt(e).
        cap: Gemma 2's soft cap by tanh, or None.
        window: how many tokens a token sees, itself and those just before it; None: all.
    """

    scale: float | None
    cap: float | None
    window: int | None

    def visible(self, back: Tensor) -> Tensor:
        """How many tokens before the query each key stands, negative where it is hidden -> bool, the keys that are seen."""
        return back >= 0 if self.window is None else (back >= 0) & (back < self.window)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q (S, H, T, e), k and v (S, H', T', e) -> (S, H, T, e).

        mask: bool, what a token sees, or `additive`; None: causal.
        """
        if self.cap is None and not slow_kernel(q):
            causal, grouped = mask is None, q.shape[1] != k.shape[1]
            if grouped and not causal and q.is_cuda:  # its fast kernels take a mask or shared keys, not both
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # (S, H, T', e)
                grouped = False
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale, enable_gqa=grouped)
        (_, H, T, e), rows = q.shape, (k.shape[1], -1)  # queries of one key: rows of one product
        mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=q.device).tril() if mask is None else mask
        queries = q.float().reshape(len(q), *rows, e) * (self.scale or e**-0.5)  # (S, H', H / H' T, e)
        products = (queries @ k.float().transpose(2, 3)).view(len(q), H, T, -1)  # -> (S, H, T, T')
        capped = products if self.cap is None else torch.tanh(products / self.cap) * self.cap
        hidden = capped.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else capped + mask
        weights = hidden.softmax(-1).to(v.dtype)  # (S, H, T, T')
        return (weights.view(len(q), *rows, k.shape[2]) @ v).view(q.shape)  # (S, H, T, T') (S, H', T', e) -> (S, H, T, e)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Which token sees which, bool -> what is added to the products of queries and keys: 0, or the least number."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def slow_kernel(q: Tensor) -> bool:
    """Whether plain products are faster than PyTorch's own: half precision on a CPU, where its backward is slow."""
    return on_cpu(q) and q.dtype in (torch.bfloat16, torch.float16)


class CausalAttention(PackedAttention):
    """Each token attends to itself and to those before it in its sequence.

    keep: cache keys and values, for AppendedTokens or Continuations.
    """

    def __init__(self, layout: PackedLayout, keep: bool = False) -> None:
        super().__init__()
        self.layout, self.keep = layout, keep
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values (S, H', T, e)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """See PackedAttention."""
        q, k, v = (self.layout.pad_input(x).transpose(1, 2) for x in (q, k, v))  # (S, H, T, e)
        if self.keep:
            self.kept[layer] = k, v
        mask = None
        if self.layout.shared:
            mask = params.visible(self.layout.distances.unsqueeze(1))  # (S, 1, T, T)
        elif params.window is not None and params.window < self.layout.max_seqlen:
            mask = params.visible(distances(torch.arange(self.layout.max_seqlen, device=q.device)))  # (T, T)
        return self.layout.unpad_input(params.attention(q, k, v, mask).transpose(1, 2))  # (S, T, H, e) -> (N, H, e)


class AppendedTokens(PackedAttention):
    """r new tokens after each of S sequences, whose keys and values an earlier CausalAttention pass cached.

    Each layer removes its keys and values from the cache once it has used them. This is the second half of the one-token
    backward (fromage.training.fast_step).
    """

    def __init__(self, before: CausalAttention, lengths: list[int], offsets: list[int], device: torch.device) -> None:
        """lengths: tokens of each sequence. offsets: r, the positions of the new tokens after a sequence's end."""
        super().__init__()
        self.kept, self.r = before.kept, len(offsets)
        ends, further = torch.tensor(lengths)[:, None, None], torch.tensor(offsets)  # (S, 1, 1), (r,)
        place = torch.arange(before.layout.max_seqlen)  # (T,)
        back = (ends + further[:, None] - place).where(place < ends, -1)  # (S, r, T); below 0: padding
        among = distances(further).expand(len(lengths), -1, -1)  # (S, r, r)
        self.back = to_device(torch.cat([back, among], 2).unsqueeze(1), device)  # (S, 1, r, T + r)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """See PackedAttention; here N = S r, the new tokens of one sequence after those of another."""
        q, k, v = (x.unflatten(0, (-1, self.r)).transpose(1, 2) for x in (q, k, v))  # (S, H, r, e)
        keys, values = (torch.cat([old, new], 2) for old, new in zip(self.kept.pop(layer), (k, v), strict=True))
        seen = params.visible(self.back)  # (S, 1, r, T + r); keys and values are (S, H', T + r, e)
        return params.attention(q, keys, values, seen).transpose(1, 2).flatten(0, 1)  # (S, H, r, e) -> (N, H, e)


class MaskedAttention(PackedAttention):
    """Each token attends to what it is told, among its own tokens and those of an earlier pass in the same rows (Octopus).

    Attributes:
        kept: layer -> keys, values (S, H', S' + T, e), of the earlier tokens and these; for a later pass.
    """

    def __init__(self, layout: PackedLayout, back: Tensor, before: MaskedAttention | None = None, keep: bool = True) -> None:
        """back: (S, T, S' + T), how many positions before each token another one stands; below 0: hidden.

        before: the pass over the S' tokens, padded. Without gradients its keys and values are given up, layer by layer.
        keep: whether a later pass follows.
        """
        super().__init__()
        self.layout, self.back, self.keep, self.past = layout, back, keep, None if before is None else before.kept
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[int | None, Tensor] = {}  # by window; one for all layers, since each keeps it for the backward

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """See PackedAttention. Where a layer runs again in the backward (activation checkpointing), what is kept stays."""
        q, k, v = (self.layout.pad_input(x).transpose(1, 2) for x in (q, k, v))  # (S, H, T, e)
        if self.past is not None:
            past = self.past[layer] if torch.is_grad_enabled() else self.past.pop(layer)
            k, v = (torch.cat([old, new], 2) for old, new in zip(past, (k, v), strict=True))  # (S, H', S' + T, e)
        if self.keep:
            self.kept.setdefault(layer, (k, v))
        if params.window not in self._masks:
            self._masks[params.window] = additive(params.visible(self.back.unsqueeze(1)), q.dtype)  # (S, 1, T, S' + T)
        out = params.attention(q, k, v, self._masks[params.window])  # (S, H, T, e)
        return self.layout.unpad_input(out.transpose(1, 2))  # (S, T, H, e) -> (N, H, e)


class Continuations(PackedAttention):
    """Sequences that continue one prefix, whose keys and values an earlier pass over the prefix cached.

    One attention over the prefix and all N tokens: each token sees the prefix, and its own sequence up to itself.

    Attributes:
        positions: (N,) of the tokens, after the prefix.
    """

    def __init__(self, prefix: CausalAttention, lengths: list[int], device: torch.device) -> None:
        super().__init__()
        self.kept = prefix.kept
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # (N,)
        place = torch.tensor([t for n in lengths for t in range(n)])  # (N,)
        own = (place[:, None] - place).where(owner[:, None] == owner, -1)  # (N, N)
        positions = prefix.layout.positions  # (T,), T tokens of the prefix
        self.positions = positions[-1] + 1 + to_device(place, device)  # (N,)
        before = self.positions[:, None] - positions  # (N, T)
        self.back = torch.cat([before, to_device(own, device)], 1)  # (N, T + N)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """See PackedAttention."""
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, H, N, e)
        # (1, H', T + N, e)
        keys, values = (torch.cat([old, new], 2) for old, new in zip(self.kept[layer], (k, v), strict=True))
        seen = params.visible(self.back)  # (N, T + N)
        return params.attention(q, keys, values, seen)[0].transpose(0, 1)  # (1, H, N, e) -> (N, H, e)


_attend: ContextVar[PackedAttention | None] = ContextVar("attend", default=None)


def current_attention() -> PackedAttention | None:
    """The PackedAttention set by `attending`; None outside of it, where Hugging Face's own attention runs."""
    return _attend.get()


def route(config: Any) -> None:
    """Have the Hugging Face model of this configuration ask `current_attention` in each call, from now on.

    Where none is set, the attention it was loaded with answers.
    """
    own = str(config._attn_implementation)
    if own.startswith(PREFIX):
        return
    name = PREFIX + own
    if name not in AttentionInterface():
        AttentionInterface.register(name, partial(_attention, own))
        if own in AttentionMaskInterface():
            AttentionMaskInterface.register(name, partial(_mask, own))
    config._attn_implementation = name


def _mask(own: str, *args: Any, **options: Any) -> Any:
    return AttentionMaskInterface()[own](*args, **options) if current_attention() is None else None


@torch.compiler.disable
def _attention(own: str, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    """The function Hugging Face calls; for packed tokens q (1, H, N, e), k and v (1, H', N, e) -> (1, N, H, e)."""
    attend = current_attention()
    if attend is None:
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return AttentionInterface().get_interface(own, eager)(module, q, k, v, mask, **options)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (N, H, e)
    layer: Any = module.layer_idx
    if mask is None and options.get("s_aux") is None:  # a bias of the model's own, or its sinks: left out, so it is refused
        attend.layers.add(layer)
    params = AttentionParams(options.get("scaling"), options.get("softcap"), options.get("sliding_window"))
    out = attend(layer, q, k, v, params)  # (N, H, e)
    return out.unsqueeze(0), None


@contextmanager
def attending(attend: PackedAttention) -> Iterator[None]:
    """Use this attention in the calls within, those of this thread, of models that `route` has seen."""
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)
