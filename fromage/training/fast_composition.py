"""The fast step of composition learning: the losses and gradients of reference_composition for less work.

The image stands in front. What runs without gradient follows from that:

1.  Without gradient: the vision tower, on reference and target images, and CLIP's text tower on target captions. Both are
    frozen and read nothing that is trained. With space 'clip' the image head is frozen too: what is asked for is constant.
2.  With gradient: every state of the language model. State h^0 of an image is W_c v(x) + b, and under causal attention
    each later token reads it in every layer, so d h(c) / d W_c is 0 for no condition, target word or [RET]. There is no
    one-token backward here: the backward of the loss at the target caption and at [RET] passes through the whole trunk,
    [W_c v(x)] [</s> c_1 ... c_a], to W_c. The weights of the language model get no gradient all the same.
3.  Both passes of the reference begin with that trunk, and causal attention makes its states the same in both. It runs
    once, and after it come two branches: the r [RET] tokens, and the target caption. Both begin at the position after
    the trunk; neither sees the other (PackedLayout). The gradients of both losses meet in the trunk, and their sum passes
    through it once. Of k + a + 1 + b and k + a + 1 + r tokens, k + a + b + r remain.
4.  The last word of a caption predicts nothing, so it is not run: b - 1 words predict, with the trunk's last token, b.
5.  Sequences are packed end to end, cross-entropy runs at the target captions alone and in chunks, and the layout comes from
    lengths known on the host, as in fromage.training.fast_step.

A loss of weight 0 has no branch; one of them has another weight.
"""

from __future__ import annotations

from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from fromage.data.tuples import TupleBatch
from fromage.models.fromage import Fromage
from fromage.models.packed_attention import CausalAttention
from fromage.models.packed_layout import PackedLayout, offsets, to_device
from fromage.models.vision.base import TextTower
from fromage.training.fast_step import mean_over_parts
from fromage.training.losses import device_weight, frozen_head_loss
from fromage.training.reference_composition import CompositionOutput, composition_info_nce, target_embeddings
from fromage.training.step import LossWeights, image_features, recomputed

TRUNK, OF_RET, OF_CAPTION = 0, 1, 2  # numbers of the branches


def fast_composition(
    model: Fromage, tuples: TupleBatch, weights: LossWeights, text_tower: TextTower | None = None, chunk: int = 0
) -> CompositionOutput:
    """The output of reference_composition, up to rounding.

    chunk: tuples whose activations are in memory at a time, 0 for all; the negatives are those of the whole batch
    (GradCache, as in fast_step).
    """
    nothing = torch.zeros((), device=model.device)
    rows = target_embeddings(model, tuples, text_tower) if weights.composition_retrieval else None  # (B, q)
    features = image_features(model, tuples)  # (B, m)
    B = len(tuples.keys)
    size = chunk or B
    parts = [(tuples.part(i, i + size), features[i : i + size]) for i in range(0, B, size)]
    run = recomputed(composed) if len(parts) > 1 else composed
    done = [run(model, part, v, weights) for part, v in parts]
    words = [sum(part.caption_lengths) for part, _ in parts]
    captioning_loss, caption_accuracy = mean_over_parts(words, [torch.stack((one.captioning, one.accuracy)) for one in done])
    captioning_loss = captioning_loss * device_weight(sum(words), model.device)
    if rows is None:
        return CompositionOutput(captioning_loss, nothing, caption_accuracy, nothing, weights)
    queries = torch.cat([one.queries for one in done])  # (B, q)
    contrastive_loss, retrieval_accuracy = composition_info_nce(model, queries, rows, weights)
    return CompositionOutput(captioning_loss, contrastive_loss, caption_accuracy, retrieval_accuracy, weights)


class PartComposed(NamedTuple):
    """Captioning loss and token accuracy of target captions, and the queries (B, q) read at [RET]; 0 where not run."""

    captioning: Tensor
    accuracy: Tensor
    queries: Tensor


def composed(model: Fromage, tuples: TupleBatch, features: Tensor, weights: LossWeights) -> PartComposed:
    """The losses of a part of a batch's tuples."""
    k, device = model.k, tuples.conditions.device
    trunk = [k + n - model.r for n in tuples.lengths]  # tokens of each
    ret = model.r if weights.composition_retrieval and not model.pools_last_word else 0
    words = [n - 1 if weights.composition_captioning else 0 for n in tuples.caption_lengths]
    each = [t + ret + n for t, n in zip(trunk, words, strict=True)]
    layout = _layout(model, trunk, ret, words, each, device)
    embeds = model.embed(_ids(model, tuples, trunk, ret, words).unsqueeze(0), model.visual_prefix(features))  # (1, N, d)
    hidden = model.lm.packed(embeds, layout.positions, CausalAttention(layout))  # (N, d)

    begins = offsets(each)
    loss, accuracy, queries = features.new_zeros((), dtype=torch.float32), features.new_zeros(()), features.new_zeros(0)
    if weights.composition_captioning:
        rows = zip(begins, trunk, words, strict=True)
        at = [i for start, t, n in rows for i in (start + t - 1, *range(start + t + ret, start + t + ret + n))]
        targets = PackedLayout(tuples.caption_lengths, device).pack(tuples.captions)  # (sum of lengths,)
        loss, accuracy = frozen_head_loss(hidden.index_select(0, to_device(at, device)), targets, model.lm)
    if weights.composition_retrieval:
        ends = to_device([start + t for start, t in zip(begins, trunk, strict=True)], device)  # (B,)
        queries = model.embed_ret(model.text_states(hidden, ends))  # (N, d) -> (B, r, d) -> (B, q)
    return PartComposed(loss, accuracy.float(), queries)


def _layout(
    model: Fromage, trunk: list[int], ret: int, words: list[int], each: list[int], device: torch.device
) -> PackedLayout:
    """The sequences trunk, [RET], caption, packed; positions and branches only where they say more than the order does."""
    branching = ret > 0 and any(words)
    if not branching and not (ret and model.config.stacked):
        return PackedLayout(each, device)
    places = [
        (*range(t), *(t + further for further in model.ret_offsets[:ret]), *range(t, t + n))
        for t, n in zip(trunk, words, strict=True)
    ]
    sides = [(TRUNK,) * t + (OF_RET,) * ret + (OF_CAPTION,) * n for t, n in zip(trunk, words, strict=True)]
    positions, branches = to_device([[*chain(*places)], [*chain(*sides)]], device)  # (2, N) -> (N,) each
    return PackedLayout(each, device, positions, branches if branching else None)


def _ids(model: Fromage, tuples: TupleBatch, trunk: list[int], ret: int, words: list[int]) -> Tensor:
    """(N,) ids of the sequences image, condition, [RET], caption."""
    device, tokenizer = tuples.conditions.device, model.tokenizer
    # (k,), (r,)
    image, asked = (to_device(ids, device) for ids in ([tokenizer.image_id] * model.k, tokenizer.ret_ids[:ret]))
    conditions = PackedLayout(tuples.lengths, device).pack(tuples.conditions)  # (sum of lengths,)
    captions = PackedLayout(tuples.caption_lengths, device).pack(tuples.captions)
    of_condition, of_caption = offsets(tuples.lengths), [0, *accumulate(tuples.caption_lengths)]
    first = int(model.start_first)
    parts = [
        (conditions[a : a + first], image, conditions[a + first : a + t - model.k], asked, captions[b : b + n])
        for a, t, b, n in zip(of_condition, trunk, of_caption, words, strict=False)
    ]
    return torch.cat(list(chain.from_iterable(parts)))  # (N,)
