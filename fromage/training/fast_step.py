"""The fast training step, with the one-token backward: the reference step's losses and gradients at a fraction of the work.

Why each shortcut is exact:

1.  The one-token backward: the retrieval pass needs a backward for [RET] only. Its only trained inputs are the r rows of
    e_RET, and these tokens come last: under causal attention nothing before them depends on a trained parameter. In layer
    l, with h^l(c) the states of the caption and h^l(i) that of [RETi],

        h^(l+1)(i) = layer(h^l(i), keys and values of {h^l(c)} and of {h^l(j): j <= i, or j = i where they are stacked}),

    where h^0(i) is row i of e_RET; so d h(c) / d e = 0, and all gradients pass through states of the r tokens alone. The
    captions run once without gradient, and their keys and values are cached; then the B r [RET] tokens run with gradient,
    packed, attending to the cache and to one another (AppendedTokens).
2.  Its next-token loss trains only the first [RET] row of the head, the only one there is. With h the frozen hidden states,
    loss = logaddexp(lse, h . e_RET) - z, where lse, the log-sum-exp over the frozen vocabulary, and z, the target's
    logit, carry no gradient. The last caption token predicts the first [RET]; what stands after that has no target.
3.  Captioning needs the full backward, but neither [RET] nor padding, which are never targets.
4.  Sequences are packed end to end (fromage.models.packed_attention), so padding is computed in attention only.
5.  Each image is encoded once for both objectives (the released code encodes it twice).
6.  Cross-entropy runs in chunks of positions that have a target; no tensor of the size of the vocabulary is kept for the
    backward.
7.  The layout comes from lengths known on the host: nothing in the step waits for the device.
"""

from __future__ import annotations

from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from fromage.data.batches import Batch
from fromage.models.fromage import Fromage
from fromage.models.packed_attention import AppendedTokens, CausalAttention
from fromage.models.packed_layout import PackedLayout, offsets, to_device
from fromage.training.losses import device_weight, frozen_head_loss, frozen_log_sum_exp
from fromage.training.step import (
    PAPER_WEIGHTS,
    LossWeights,
    StepOutput,
    check_captions,
    contrast,
    count_targets,
    count_text_targets,
    image_features,
    not_run,
    recomputed,
)


def fast_step(
    model: Fromage,
    batch: Batch,
    paired: bool,
    weights: LossWeights = PAPER_WEIGHTS,
    chunk: int = 0,
    dropout: Tensor | None = None,
) -> StepOutput:
    """The output of reference_step, up to rounding.

    Args:
        paired: whether two examples share a captioning sequence.
        weights: of the losses of the two passes.
        dropout: factors of dropout on image features, as of reference_step.
        chunk: examples whose activations are in memory at a time; 0 for all. InfoNCE still uses the negatives of the whole
            batch: its embeddings are kept, and the chunks run again one by one in the backward (GradCache: Gao et al.,
            "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021).
    """
    check_captions(model, batch)
    parts = chunks(model, batch, chunk + chunk % 2) if chunk else [batch]  # an even number, so that pairs stay together
    features = [image_features(model, part) for part in parts]  # (b, m) each
    run = recomputed(part_losses) if len(parts) > 1 else part_losses
    captioned = _of_first(parts, weights.captioned(model, batch))  # examples of each part that are captioned
    done = [run(model, part, v, paired, weights, n) for part, v, n in zip(parts, features, captioned, strict=True)]
    words = [count_targets(model, part.part(0, n)) if n else 0 for part, n in zip(parts, captioned, strict=True)]
    captioning_loss, caption_accuracy = mean_over_parts(words, [torch.stack((one.captioning, one.accuracy)) for one in done])
    query_words = [count_text_targets(model, part.queries) for part in parts]
    text_loss = mean_over_parts(query_words, [one.text for one in done])
    texts, v = torch.cat([one.texts for one in done]), torch.cat(features)  # (B, q), (B, m)
    contrastive_loss, retrieval_accuracy, images = contrast(model, v, texts, weights, dropout)
    scales = [device_weight(sum(counts), batch.ids.device) for counts in (words, query_words)]
    losses = captioning_loss * scales[0], text_loss * scales[1], contrastive_loss
    return StepOutput(*losses, caption_accuracy, retrieval_accuracy, images, texts, weights)


def mean_over_parts(targets: list[int], means: list[Tensor]) -> Tensor:
    """The mean over all targets of a batch, from the numbers and means of those of its parts."""
    return torch.stack([mean * (n / sum(targets)) for mean, n in zip(means, targets, strict=True)]).sum(0)


def _of_first(parts: list[Batch], n: int) -> list[int]:
    """How many examples of each part are among the first n of all."""
    sizes = [len(part.lengths) for part in parts]
    return [min(max(n - start, 0), size) for start, size in zip(offsets(sizes), sizes, strict=True)]


def chunks(model: Fromage, batch: Batch, size: int) -> list[Batch]:
    """Parts of `size` examples. One without any token but [RET] cannot run alone.

    It joins the part before it; the first one joins the next.
    """
    B = len(batch.lengths)
    begins = [i for i in range(0, B, size) if count_text_targets(model, batch.part(i, i + size))]
    return [batch.part(i, j) for i, j in pairwise([0, *begins[1:], B])]


class PartLosses(NamedTuple):
    """Captioning loss and its token accuracy, text loss, all scalars, and text embeddings (B, q), of a part of a batch.

    Of a pass that is not run, losses are 0, and embeddings have no rows.
    """

    captioning: Tensor
    accuracy: Tensor
    text: Tensor
    texts: Tensor


def part_losses(model: Fromage, batch: Batch, features: Tensor, paired: bool, weights: LossWeights, n: int) -> PartLosses:
    """The losses of a part of a batch; captioning is of its first n examples."""
    captioning_loss, caption_accuracy = not_run(model.device)
    if weights.captioning and n and count_targets(model, some := batch.part(0, n)):
        captioning_loss, caption_accuracy = captioning(model, some, features[:n], paired)
    if not weights.runs_retrieval:
        return PartLosses(captioning_loss, caption_accuracy, not_run(model.device)[0], features.new_zeros(0, model.q))
    text_loss, text_states = retrieval_text(model, batch.queries)
    return PartLosses(captioning_loss, caption_accuracy, text_loss, model.embed_ret(text_states))


@record_function("captioning")
def captioning(model: Fromage, batch: Batch, features: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    """Next-token loss of [W_c v(x)] [</s> y_1 ... y_n], packed, and its token accuracy (equation 1): shortcuts 3, 4, 6.

    Where the start token stands first, of [</s>] [W_c v(x)] [y_1 ... y_n], and of a pair that shares it.
    """
    k, r, first = model.k, model.r, int(model.start_first)
    targets = [n - r - first for n in batch.lengths]  # how many each caption has: without [RET], and a start token in front
    words = PackedLayout(batch.lengths, batch.ids.device)
    packed = words.pack(batch.ids)  # (sum of lengths,)
    places = packed.new_full((k,), model.tokenizer.image_id)  # (k,)
    bounds = pairwise([*words.starts, len(packed)])
    starts = [first and not (paired and i % 2) for i in range(len(targets))]  # whether an example brings its own start token
    parts = [(packed[a : a + s], places, packed[a + first : b - r]) for (a, b), s in zip(bounds, starts, strict=True)]
    ids = torch.cat(list(chain.from_iterable(parts)))  # (N,)
    each = [s + k + n for s, n in zip(starts, targets, strict=True)]
    rows = PackedLayout([sum(each[i : i + 2]) for i in range(0, len(each), 2)] if paired else each, ids.device)
    embeds = model.embed(ids.unsqueeze(0), model.visual_prefix(features))  # (1, N, d)
    hidden = model.lm.packed(embeds, rows.positions, CausalAttention(rows))  # (N, d)
    ends = accumulate(each)
    at = [end - n - 1 + t for end, n in zip(ends, targets, strict=True) for t in range(n)]
    before = to_device(at, ids.device)  # (sum of targets,), the position before each
    return frozen_head_loss(hidden.index_select(0, before), ids[before + 1], model.lm)  # (N, d) -> (sum of targets, d)


@record_function("the text pass")
def retrieval_text(model: Fromage, batch: Batch) -> tuple[Tensor, Tensor]:
    """Next-token loss of [</s> y_1 ... y_n [RET]], and the hidden states (B, r, d) at [RET]: shortcuts 1 and 2.

    The loss is that of the released code; the paper has no formula for it (see reference_step).
    """
    device, r, lengths = batch.ids.device, model.r, [n - model.r for n in batch.lengths]
    rows = PackedLayout(lengths, device)
    ids = rows.pack(batch.ids)  # (N,), without [RET]
    before = CausalAttention(rows, keep=True)
    with torch.no_grad():
        hidden = model.lm.packed(model.lm.embed(ids.unsqueeze(0)), rows.positions, before)  # (N, d)
        targets = rows.pack(batch.ids[:, 1:])  # (N,): y_1 ... y_n [RET]
        lse, z = frozen_log_sum_exp(hidden, targets, model.lm)  # (N,) each; z is 0 where [RET] is the target
    ret_logit = model.lm.capped((hidden @ model.lm.added.output[0].to(hidden.dtype)).float())  # (N,)
    is_ret = targets == model.tokenizer.ret_id  # (N,)
    text_loss = (torch.logaddexp(lse, ret_logit) - torch.where(is_ret, ret_logit, z)).mean()

    if model.pools_last_word:
        return text_loss, model.text_states(hidden, to_device(list(accumulate(lengths)), device))  # (N, d) -> (B, 1, d)
    ret = model.lm.embed(to_device(model.tokenizer.ret_ids * len(lengths), device).unsqueeze(0))  # (1, B r, d)
    positions = to_device([n + further for n in lengths for further in model.ret_offsets], device)  # (B r,)
    text_states = model.lm.packed(ret, positions, AppendedTokens(before, lengths, model.ret_offsets, device))  # (B r, d)
    return text_loss, text_states.unflatten(0, (-1, r))  # (B, r, d)
