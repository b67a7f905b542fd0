"""The training step as the released code computes it; the reference for fast_step.

Two passes through the language model, both padded and both with a full backward:

    captioning   [W_c v(x)] [</s> y_1 ... y_n]     next-token loss on the caption, </s> included; with probability 0.5
                                                   two examples share one sequence: image caption image caption
    retrieval    [</s> y_1 ... y_n [RET]]          next-token loss, [RET] included, and InfoNCE of W_t h_[RET] with W_i v(x)

The loss is the sum of the three, all weights 1. [RET] and padding are never targets of captioning. In the
paper's formula the retrieval pass has no next-token loss; the released code has one, and so has this step: without it the
model never emits [RET] by itself. Captions are truncated before, with [RET] kept: fromage.data.tokenizer.

With r > 1 the retrieval pass is [</s> y_1 ... y_n [RET] [RET2] ... [RETr]], and W_t h_[RET] the fusion of all r. As in
GILL's code, of these tokens the first alone is a target: generation chooses it, and the others follow without being chosen.
In GILL's softmax they have columns all the same, which its generation bars; here they have none, in training too.

With data.requests the retrieval pass reads some captions framed as requests, [</s> "Show me:" y_1 ... y_n [RET]], and both
its losses are of that text (Batch.queries). The captioning pass reads the caption alone, as before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fromage.data.batches import Batch
from fromage.data.padding import token_mask
from fromage.models.fromage import Fromage
from fromage.training.losses import device_weight, next_token_loss
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
)


def captioning_ids(model: Fromage, batch: Batch, paired: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask of the captioning pass, (B, k + T), or (B / 2, 2 (k + T)) if two examples share a row.

    [RET] and padding are masked, and where the start token stands first, that of the second of a pair. In an odd batch the
    last example has a row of its own.
    """
    B, first = len(batch.ids), int(model.start_first)
    places = batch.ids.new_full((B, model.k), model.tokenizer.image_id)  # (B, k)
    words = _token_mask(batch, without=model.r)  # (B, T), without [RET]
    texts = batch.ids.masked_fill(~words, model.tokenizer.pad_id)  # (B, T)
    ids = torch.cat([texts[:, :first], places, texts[:, first:]], 1)  # (B, k + T)
    mask = torch.cat([words[:, :first], torch.ones_like(places, dtype=torch.bool), words[:, first:]], 1)  # (B, k + T)
    if not paired:
        return ids, mask
    mask[1::2, :first] = False  # (B / 2,): one start token for both
    if B % 2:
        ids = torch.cat([ids, torch.full_like(ids[:1], model.tokenizer.pad_id)])  # (B + 1, k + T)
        mask = torch.cat([mask, torch.zeros_like(mask[:1])])
    return ids.reshape(-1, 2 * ids.shape[1]), mask.reshape(-1, 2 * mask.shape[1])  # (B, k + T) -> (B / 2, 2 (k + T))


def _token_mask(batch: Batch, without: int) -> Tensor:
    """(B, T) bool: the positions of each caption, except its last `without` tokens."""
    return token_mask([n - without for n in batch.lengths], batch.ids.shape[1], batch.ids.device)


def _captioning(model: Fromage, batch: Batch, paired: bool) -> tuple[Tensor, Tensor]:
    """Next-token loss of [W_c v(x)] [</s> y_1 ... y_n], padded, and its token accuracy (equation 1)."""
    prefix = model.visual_prefix(image_features(model, batch))  # (B, k, d)
    ids, mask = captioning_ids(model, batch, paired)
    hidden = model.lm(model.embed(ids, prefix), mask)  # (B, k + T, d)
    labels = ids.masked_fill(~mask | (ids == model.tokenizer.image_id), -100)  # (B, k + T)
    labels[:, : int(model.start_first)] = -100  # nothing comes before it
    return next_token_loss(model.lm.logits(hidden), labels)  # (B, k + T, V + 1 + r)


def _retrieval_text(model: Fromage, queries: Batch) -> tuple[Tensor, Tensor]:
    """Next-token loss of [</s> y_1 ... y_n [RET]], padded, and the text embeddings (B, q)."""
    hidden, text_states = model.hidden_of_texts(queries.ids, queries.lengths)  # (B, T, d), (B, r, d)
    labels = queries.ids.masked_fill(~_token_mask(queries, without=model.r - 1), -100)  # (B, T): of r [RET] tokens the first
    text_loss, _ = next_token_loss(model.lm.logits(hidden), labels)
    return text_loss, model.embed_ret(text_states)


def reference_step(
    model: Fromage, batch: Batch, paired: bool, weights: LossWeights = PAPER_WEIGHTS, dropout: Tensor | None = None
) -> StepOutput:
    """Losses of one batch, by the two passes above.

    Args:
        paired: whether two examples share a captioning sequence.
        weights: of the losses of the two passes.
        dropout: (B, m) factors of dropout on the image features that the image head reads; None: without.
    """
    check_captions(model, batch)
    run, captioned = weights.captioning != 0, batch.part(0, weights.captioned(model, batch))
    captioning_loss, caption_accuracy = _captioning(model, captioned, paired) if run else not_run(model.device)

    features = image_features(model, batch)  # (B, m); as in the released code, images are encoded twice
    text_loss, texts = not_run(model.device)[0], features.new_zeros(0, model.q)
    if weights.runs_retrieval:
        text_loss, texts = _retrieval_text(model, batch.queries)  # the latter (B, q)
    contrastive_loss, retrieval_accuracy, images = contrast(model, features, texts, weights, dropout)
    counts = count_targets(model, captioned), count_text_targets(model, batch.queries)
    scales = [device_weight(count, batch.ids.device) for count in counts]
    losses = captioning_loss * scales[0], text_loss * scales[1], contrastive_loss
    return StepOutput(*losses, caption_accuracy, retrieval_accuracy, images, texts, weights)
