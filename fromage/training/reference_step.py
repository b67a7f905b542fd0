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

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fromage.data.batches import Batch, FurtherTexts
from fromage.data.padding import token_mask
from fromage.data.tuples import Images, Tuples
from fromage.errors import UserError, first_few
from fromage.models.fromage import Fromage
from fromage.models.packed_attention import to_device
from fromage.training.losses import device_weight, info_nce, next_token_loss


class Weights(NamedTuple):
    """Weights of the losses of the two passes, and what counts in them. A captioning pass of weight 0 is not run.

    The losses of composition learning (fromage.training.reference_composition) have no pass at weight 0 either.
    """

    captioning: float = 1.0
    retrieval: float = 1.0  # of its next-token loss and InfoNCE
    same_image_negatives: bool = True  # whether other captions of an image are its negatives
    composition_captioning: float = 0.0
    composition_retrieval: float = 0.0
    captioned_share: float = 1.0  # of the examples, the first of a batch: those that the captioning pass reads

    def captioned(self, model: Fromage, batch: Batch) -> int:
        """Number of the first examples of a batch that the captioning pass reads: an even one, and a word among them."""
        B, n = len(batch.lengths), round(self.captioned_share * len(batch.lengths))
        worded = next(i for i, length in enumerate(batch.lengths) if length > len(model.tokenizer.start()) + model.r)
        n = max(n, worded + 1)
        return min(n + n % 2, B)

    @property
    def composes(self) -> bool:
        """Whether anything is learned from tuples."""
        return self.composition_captioning != 0 or self.composition_retrieval != 0


ALL = Weights()


def freeze_unused(model: Fromage, weights: Weights, freeze_temperature: bool = False) -> None:
    """Freeze the parameters that no loss of these weights reaches, and train the others."""
    finding = weights.retrieval + weights.composition_retrieval > 0
    model.visual_prefix.requires_grad_(weights.captioning > 0 or weights.composes)
    for part in (model.text_head, model.image_head, model.fusion):
        part.requires_grad_(finding)
    if model.space == "clip":
        model.image_head.requires_grad_(False)
    model.logit_scale.requires_grad_(finding and not freeze_temperature)
    model.ret.input.requires_grad_(model.pooling == "ret" or model.ret.tied)  # with pooling last no input is [RET]


@dataclass
class StepOutput:
    """The three losses and accuracies (0 to 1), all scalars; image and text embeddings, (B, q) unit rows.

    Attributes:
        caption_accuracy: token accuracy of captioning.
        retrieval_accuracy: share of pairs that rank first within the batch, averaged over both directions.
    """

    captioning_loss: Tensor
    text_loss: Tensor
    contrastive_loss: Tensor
    caption_accuracy: Tensor
    retrieval_accuracy: Tensor
    images: Tensor
    texts: Tensor
    weights: Weights

    @property
    def loss(self) -> Tensor:
        """Their weighted sum."""
        retrieval = self.text_loss + self.contrastive_loss
        return self.weights.captioning * self.captioning_loss + self.weights.retrieval * retrieval


def image_features(model: Fromage, batch: Batch | Tuples | Images) -> Tensor:
    """(B, m) image features: the stored ones if the batch has them, else computed by the tower."""
    return batch.features.to(model.device) if batch.features is not None else model.vision(batch.pixels)


def text_embeddings(model: Fromage, texts: Batch | FurtherTexts) -> Tensor:
    """(B, q) unit rows of captions, read at [RET]."""
    return model.embed_ret(model.hidden_at_ret(texts.ids.to(model.device), texts.lengths)[1])  # (B, T) -> (B, q)


def count_targets(model: Fromage, batch: Batch) -> int:
    """Number of targets of captioning, or of batch.queries of retrieval: all tokens of the texts except r each."""
    return sum(batch.lengths) - model.r * len(batch.lengths)


def check_captions(model: Fromage, batch: Batch) -> None:
    """Raise UserError if no caption of the batch has a word."""
    if max(batch.lengths) <= len(model.tokenizer.start()) + model.r:
        remedy = "correct the txt files of the shards, or raise max_tokens"
        raise UserError(f"no caption of this batch has a word (samples {first_few(batch.keys)}): {remedy}")


def captioning_ids(model: Fromage, batch: Batch, paired: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask of the captioning pass, (B, k + T), or (B / 2, 2 (k + T)) if two examples share a row.

    [RET] and padding are masked. In an odd batch the last example has a row of its own.
    """
    B = len(batch.ids)
    places = batch.ids.new_full((B, model.k), model.tokenizer.image_id)  # (B, k)
    words = _token_mask(batch, without=model.r)  # (B, T), without [RET]
    ids = torch.cat([places, batch.ids.masked_fill(~words, model.tokenizer.pad_id)], 1)  # (B, k + T)
    mask = torch.cat([torch.ones_like(places, dtype=torch.bool), words], 1)  # (B, k + T)
    if not paired:
        return ids, mask
    if B % 2:
        ids = torch.cat([ids, torch.full_like(ids[:1], model.tokenizer.pad_id)])  # (B + 1, k + T)
        mask = torch.cat([mask, torch.zeros_like(mask[:1])])
    return ids.reshape(-1, 2 * ids.shape[1]), mask.reshape(-1, 2 * mask.shape[1])  # (B, k + T) -> (B / 2, 2 (k + T))


def _token_mask(batch: Batch, without: int) -> Tensor:
    """(B, T) bool: the positions of each caption, except its last `without` tokens."""
    return token_mask([n - without for n in batch.lengths], batch.ids.shape[1], batch.ids.device)


def no_captioning(device: torch.device) -> tuple[Tensor, Tensor]:
    """Loss and token accuracy of a captioning pass that is not run: 0."""
    return torch.zeros((), device=device), torch.zeros((), device=device)


def _captioning(model: Fromage, batch: Batch, paired: bool) -> tuple[Tensor, Tensor]:
    """Next-token loss of [W_c v(x)] [</s> y_1 ... y_n], padded, and its token accuracy (equation 1)."""
    prefix = model.prefix(image_features(model, batch))  # (B, k, d)
    ids, mask = captioning_ids(model, batch, paired)
    hidden = model.lm(model.embed(ids, prefix), mask)  # (B, k + T, d)
    labels = ids.masked_fill(~mask | (ids == model.tokenizer.image_id), -100)  # (B, k + T)
    return next_token_loss(model.lm.logits(hidden), labels)  # (B, k + T, V + 1 + r)


def dropped(features: Tensor, factors: Tensor | None) -> Tensor:
    """(B, m) image features behind dropout, by its factors."""
    return features if factors is None else features * to_device(factors, features.device)


def reference_step(
    model: Fromage, batch: Batch, paired: bool, weights: Weights = ALL, dropout: Tensor | None = None
) -> StepOutput:
    """Losses of one batch, by the two passes above.

    Args:
        paired: whether two examples share a captioning sequence.
        weights: of the losses of the two passes.
        dropout: (B, m) factors of dropout on the image features that the image head reads; None: without.
    """
    check_captions(model, batch)
    run, told = weights.captioning != 0, batch.part(0, weights.captioned(model, batch))
    captioning_loss, caption_accuracy = _captioning(model, told, paired) if run else no_captioning(model.device)

    queries = batch.queries
    hidden, at_ret = model.hidden_at_ret(queries.ids, queries.lengths)  # (B, T, d), (B, r, d)
    labels = queries.ids.masked_fill(~_token_mask(queries, without=model.r - 1), -100)  # (B, T): of r [RET] tokens the first
    text_loss, _ = next_token_loss(model.lm.logits(hidden), labels)

    features = image_features(model, batch)  # (B, m); as in the released code, images are encoded twice
    images = model.embed_images(dropped(features, dropout))  # (B, q)
    texts = model.embed_ret(at_ret)  # (B, q)
    apart = None if weights.same_image_negatives else features
    contrastive_loss, retrieval_accuracy = info_nce(images, texts, model.logit_scale, apart)
    captioned, asked = (device_weight(count_targets(model, some), batch.ids.device) for some in (told, queries))
    losses = captioning_loss * captioned, text_loss * asked, contrastive_loss
    return StepOutput(*losses, caption_accuracy, retrieval_accuracy, images, texts, weights)
