"""The losses: next-token cross-entropy (equation 1) and InfoNCE in both directions (equations 2 to 4).

next_token_loss is the reference. frozen_head_loss and frozen_log_sum_exp are the same cross-entropy for a head in which only
the added rows are trained: in chunks, with the gradient of the hidden states computed in the forward.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fromage.models.cpu_linear import cpu_linear
from fromage.processor import on_cpu

if TYPE_CHECKING:
    from fromage.models.language_model import LanguageModel

HASH = 6364136223846793005  # of Knuth's linear congruential generator
CHUNK, CPU_CHUNK = 1024, 512  # positions whose logits exist at a time; fewer make the matrix products slower


def next_token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token, averaged over all targets: equation 1 of the paper.

    logits (B, T, V + 1 + r) at position t predict labels (B, T) at t + 1; -100 is no target. Returns the loss and the token
    accuracy, both scalars. As in the paper and the released code.
    """
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # (B (T - 1), V + 1 + r), (B (T - 1),)
    accuracy = (logits.argmax(-1) == labels).sum() / (labels >= 0).sum()
    return F.cross_entropy(logits.float(), labels, ignore_index=-100), accuracy


def frozen_head_loss(hidden: Tensor, targets: Tensor, lm: LanguageModel) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of targets (N,) given hidden states (N, d), and the token accuracy.

    Gradients reach hidden and the added rows.
    """
    return _FrozenHeadLoss.apply(hidden, lm.added.output, targets, lm)


class _FrozenHeadLoss(torch.autograd.Function):
    """With p = softmax(W h): d loss / d h = W^T (p - onehot) / N, computed chunk by chunk together with the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, targets: Tensor, lm: LanguageModel) -> tuple[Tensor, Tensor]:
        V, first, weight = lm.added.vocab_size, lm.added.first, lm.head.weight[: lm.added.vocab_size]  # (V, d)
        grad_hidden, grad_rows = torch.empty_like(hidden), torch.zeros_like(rows)
        loss, accuracy = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
        chunk = positions_at_a_time(len(hidden), on_cpu(hidden))
        for h, ids, out in zip(*(x.split(chunk) for x in (hidden, targets, grad_hidden)), strict=True):
            frozen, added = lm.frozen_logits(h), lm.capped((h @ rows.to(h.dtype).T).float())  # (c, V), (c, n - f)
            # derivatives of the soft cap, before the logits are overwritten
            slopes = None if lm.cap is None else [1 - (x / lm.cap) ** 2 for x in (frozen, added)]
            ids, is_added = ids.unsqueeze(1), ids.unsqueeze(1) >= first  # (c, 1) each
            in_frozen, in_added = ids.clamp(max=V - 1), (ids - first).clamp(min=0)  # (c, 1) each, columns
            target_logit = torch.where(is_added, added.gather(1, in_added), frozen.gather(1, in_frozen))  # (c, 1)
            top = torch.maximum(frozen.amax(1, keepdim=True), added.amax(1, keepdim=True))  # (c, 1)
            # from here exp(logit - top); in place, since passes over (c, V) are limited by memory bandwidth
            frozen, added = frozen.sub_(top).exp_(), added.sub_(top).exp_()
            total = frozen.sum(1, keepdim=True) + added.sum(1, keepdim=True)  # (c, 1), so that p = frozen / total
            loss += (total.log() + top - target_logit).sum()
            accuracy += (target_logit >= top).sum()
            if hidden.requires_grad:
                # from here total * (p - onehot)
                frozen.scatter_add_(1, in_frozen, -total * ~is_added)
                added.scatter_add_(1, in_added, -total * is_added)
                if slopes:
                    frozen, added = frozen.mul_(slopes[0]), added.mul_(slopes[1])
                scale = lm.factor / (total * len(hidden))  # (c, 1)
                grad = cpu_linear(frozen.to(h.dtype), weight.T).add_(added.to(h.dtype) @ rows.to(h.dtype))  # (c, d)
                torch.mul(grad, scale, out=out)  # (c, d), a view of grad_hidden
                grad_rows += ((added * scale).to(h.dtype).T @ h).to(rows.dtype)  # (n - f, d)
        ctx.save_for_backward(grad_hidden, grad_rows)
        accuracy /= len(hidden)
        ctx.mark_non_differentiable(accuracy)
        return loss / len(hidden), accuracy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        grad_hidden, grad_rows = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_rows * grad.to(grad_rows.dtype), None, None


def positions_at_a_time(count: int, on_host: bool = False) -> int:
    """Positions whose logits exist at a time: `count` in as few parts as may be, of one size. on_host: on a CPU."""
    parts = ceil(count / (CPU_CHUNK if on_host else CHUNK))
    return ceil(count / max(parts, 1)) or 1


@torch.no_grad()
def frozen_log_sum_exp(hidden: Tensor, targets: Tensor, lm: LanguageModel) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the frozen vocabulary and the targets' logits, (N,) float32 each; an added token's is 0."""
    V, lses, zs = lm.added.vocab_size, [], []
    chunk = positions_at_a_time(len(hidden), on_cpu(hidden))
    for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = lm.frozen_logits(h)  # (c, V)
        zs.append(torch.where(t < V, logits.gather(1, t.clamp(max=V - 1).unsqueeze(1)).squeeze(1), 0.0))
        top = logits.amax(1, keepdim=True)  # (c, 1)
        lses.append(logits.sub_(top).exp_().sum(1).log() + top.squeeze(1))
    return torch.cat(lses), torch.cat(zs)


def info_nce(images: Tensor, texts: Tensor, logit_scale: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """InfoNCE in both directions, averaged: equations 2 to 4 of the paper, with its learned temperature.

    images, texts: (B, q) unit rows; row i of both is a pair. logit_scale: scalar, log of 1 / temperature. The negatives are
    those of all D devices. Returns the loss and the share of pairs that rank first, averaged over directions. (In the
    released run logit_scale was bfloat16, too coarse to move at this learning rate; here it is float32 and learns.)

    features: (B, m) of the images; where rows are equal it is one image, whose other captions are no negatives. None, as in
    the paper: all of the batch are.
    """
    images, texts = gather_with_gradient(images), gather_with_gradient(texts)  # (D B, q) on D devices
    logits = logit_scale.exp() * images @ texts.T  # (D B, D B)
    target = torch.arange(len(logits), device=logits.device)  # (D B,)
    if features is not None:
        of = row_hashes(gather_with_gradient(features))  # (D B,): which image a row is of
        same = (of.unsqueeze(0) == of.unsqueeze(1)) & (target.unsqueeze(0) != target.unsqueeze(1))  # (D B, D B)
        logits = logits.masked_fill(same, -torch.inf)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    accuracy = ((logits.argmax(1) == target).float().mean() + (logits.argmax(0) == target).float().mean()) / 2
    return loss, accuracy


def row_hashes(rows: Tensor) -> Tensor:
    """(N, m) numbers -> (N,) int64, the same for equal rows alone, up to collisions of 64 bits.

    A polynomial of the bits, without waiting for the device, as torch.unique would.
    """
    bits = (rows.detach().float() + 0.0).view(torch.int32).long()  # (N, m); + 0.0 makes a zero of -0.0
    powers = torch.full((rows.shape[1],), HASH, device=rows.device).cumprod(0)  # (m,), modulo 2^64
    return (bits * powers).sum(1)


def devices() -> int:
    """Number of devices that share a training step; 1 outside of training, where each device evaluates alone."""
    alone = not (dist.is_available() and dist.is_initialized() and torch.is_grad_enabled())
    return 1 if alone else dist.get_world_size()


def gather_with_gradient(rows: Tensor) -> Tensor:
    """(B, q) on each of D devices -> (D B, q) on all of them, in rank order, with gradients to every device's own rows.

    The backward sums what all devices send, so that the mean over devices that DDP takes afterwards is the gradient of
    one process with the whole batch. PyTorch has no public function for it that serves here: all_gather of
    torch.distributed.nn.functional is deprecated in 2.14, and what replaces it is in a private module whose names differ
    between versions.
    """
    return rows if devices() == 1 else _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        everyone = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, rows.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def device_weight(count: int, device: torch.device) -> Tensor | float:
    """Weight of this device's mean over `count` targets, so that DDP's mean over D devices is the mean over all targets.

    It is D count / (sum of counts over the devices), and 0 where no device has a target. All devices must call it together.
    """
    if devices() == 1:
        return 1.0
    total = torch.full((), float(count), device=device)
    dist.all_reduce(total)
    return count * devices() / total.clamp(min=1)
