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
        for h, t, out in zip(*(x.split(chunk) for x in (hidden, targets, grad_hidden)), strict=True):
            e, z = lm.frozen_logits(h), lm.capped((h @ rows.to(h.dtype).T).float())  # (c, V), (c, n)
            slopes = None if lm.cap is None else [1 - (x / lm.cap) ** 2 for x in (e, z)]
            t, is_added = t.unsqueeze(1), t.unsqueeze(1) >= first  # (c, 1) each
            of_frozen, of_added = t.clamp(max=V - 1), (t - first).clamp(min=0)  # columns
            target = torch.where(is_added, z.gather(1, of_added), e.gather(1, of_frozen))  # (c, 1)
            top = torch.maximum(e.amax(1, keepdim=True), z.amax(1, keepdim=True))  # (c, 1)
            e, z = e.sub_(top).exp_(), z.sub_(top).exp_()  # in place: passes over (c, V) are limited by memory bandwidth
            s = e.sum(1, keepdim=True) + z.sum(1, keepdim=True)  # (c, 1), so that p = e / s
            loss += (s.log() + top - target).sum()
            accuracy += (target >= top).sum()
            if hidden.requires_grad:
                e.scatter_add_(1, of_frozen, -s * ~is_added)
                z.scatter_add_(1, of_added, -s * is_added)  # now e and z are s (p - onehot)
                if slopes:
                    e, z = e.mul_(slopes[0]), z.mul_(slopes[1])
                scale = lm.factor / (s * len(hidden))  # (c, 1)
                back = cpu_linear(e.to(h.dtype), weight.T).add_(z.to(h.dtype) @ rows.to(h.dtype))  # (c, d)
                torch.mul(back, scale, out=out)  # (c, d), a view of grad_hidden
                grad_rows += ((z * scale).to(h.dtype).T @ h).to(rows.dtype)  # (n, d)
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
    those of all W devices. Returns the loss and the share of pairs that rank first, averaged over directions. (In the
    released run logit_scale was bfloat16, too coarse to move at this learning rate; here it is float32 and learns.)

    features: (B, m) of the images; where rows are equal it is one image, whose other captions are no negatives. None, as in
    the paper: all of the batch are.
    """
    images, texts = gather_with_gradient(images), gather_with_gradient(texts)  # (W B, q) on W devices
    logits = logit_scale.exp() * images @ texts.T  # (W B, W B)
    target = torch.arange(len(logits), device=logits.device)  # (W B,)
    if features is not None:
        of = row_hashes(gather_with_gradient(features))  # (W B,): which image a row is of
        same = (of.unsqueeze(0) == of.unsqueeze(1)) & (target.unsqueeze(0) != target.unsqueeze(1))  # (W B, W B)
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
    """(B, q) on each of W devices -> (W B, q) on all of them, in rank order, with gradients to every device's own rows.

    The backward sums what all devices send, so that the mean over devices that DDP takes afterwards is the gradient of
    one process with the whole batch. PyTorch has no public function for it that serves here: all_gather of
    torch.distributed.nn.functional is deprecated in 2.14, and what replaces it is in a private module whose names differ
    between 2.5 and 2.14.
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
    """Weight of this device's mean over `count` targets, so that DDP's mean over W devices is the mean over all targets.

    It is W count / (sum of counts over the devices), and 0 where no device has a target. All devices must call it together.
    """
    if devices() == 1:
        return 1.0
    total = torch.full((), float(count), device=device)
    dist.all_reduce(total)
    return count * devices() / total.clamp(min=1)
