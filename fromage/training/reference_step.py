"""The training step as the authors compute it: the reference for everything faster.

Two passes through the language model, both padded and both with the whole backward:

    captioning   [W_c v(x)] [</s> y_1 ... y_n]     next-token loss on the caption, </s> included; with probability 0.5
                                                   two examples share one sequence: image caption image caption
    retrieval    [</s> y_1 ... y_n [RET]]          next-token loss, [RET] included, and InfoNCE of W_t h_[RET] with W_i v(x)

The loss is the sum of the three, all weights 1. [RET] and padding take no part in captioning. (In the paper's formula the
retrieval pass has no next-token loss; the released code has it, and without it the model never says [RET] by itself.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fromage.data.batches import Batch
from fromage.errors import UserError
from fromage.models.fromage import Fromage
from fromage.training.losses import device_weight, info_nce, next_token_loss


class Weights(NamedTuple):
    """What the losses of the two passes are multiplied by. A captioning pass of weight 0 is not run, and its loss is 0."""

    captioning: float = 1.0
    retrieval: float = 1.0  # of its next-token loss and of InfoNCE


ALL = Weights()


@dataclass
class StepOutput:
    """The three losses and what they got right (shares of 1), all scalars; and both sides' embeddings, (B, q) unit rows."""

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


def image_features(model: Fromage, batch: Batch) -> Tensor:
    """(B, m): stored ones where the batch has them, else the tower's."""
    return batch.features.to(model.device) if batch.features is not None else model.vision(batch.pixels)


def targets(batch: Batch) -> int:
    """How many targets either pass has: all tokens of the captions but one each."""
    return sum(batch.lengths) - len(batch.lengths)


def check_captions(model: Fromage, batch: Batch) -> None:
    """Raise UserError for a batch none of whose captions has a word: there is nothing to learn from it."""
    if max(batch.lengths) <= len(model.tokenizer.start()) + 1:
        shown = ", ".join(batch.keys[:8]) + (", ..." if len(batch.keys) > 8 else "")
        raise UserError(f"no caption of this batch has a word (samples {shown}): mend the shards' txt, or raise max_tokens")


def captioning_ids(model: Fromage, batch: Batch, paired: bool) -> tuple[Tensor, Tensor]:
    """The captioning pass's ids and their mask, (B, k + T), or (B / 2, 2 (k + T)) when two examples share a row.

    [RET] and padding are masked. An odd batch keeps its last example in a row of its own.
    """
    B = len(batch.ids)
    places = batch.ids.new_full((B, model.k), model.tokenizer.image_id)  # (B, k)
    words = _within(batch, behind=1)  # (B, T), without [RET]
    ids = torch.cat([places, batch.ids.masked_fill(~words, model.tokenizer.pad_id)], 1)  # (B, k + T)
    mask = torch.cat([torch.ones_like(places, dtype=torch.bool), words], 1)
    if not paired:
        return ids, mask
    if B % 2:
        ids = torch.cat([ids, torch.full_like(ids[:1], model.tokenizer.pad_id)])
        mask = torch.cat([mask, torch.zeros_like(mask[:1])])
    return ids.reshape(-1, 2 * ids.shape[1]), mask.reshape(-1, 2 * mask.shape[1])


def _within(batch: Batch, behind: int) -> Tensor:
    """(B, T): whether a place is in the caption, its last `behind` tokens left out."""
    ends = torch.tensor(batch.lengths, device=batch.ids.device).unsqueeze(1) - behind  # (B, 1)
    return torch.arange(batch.ids.shape[1], device=batch.ids.device) < ends


def no_captioning(device: torch.device) -> tuple[Tensor, Tensor]:
    """Loss and share of tokens foreseen of the captioning pass that is not run: 0."""
    return torch.zeros((), device=device), torch.zeros((), device=device)


def _captioning(model: Fromage, batch: Batch, paired: bool) -> tuple[Tensor, Tensor]:
    """Next-token loss of [W_c v(x)] [</s> y_1 ... y_n], padded, and the share of tokens foreseen."""
    prefix = model.prefix(image_features(model, batch))  # (B, k, d)
    ids, mask = captioning_ids(model, batch, paired)
    hidden = model.lm(model.embed(ids, prefix), mask)  # (B, k + T, d)
    labels = ids.masked_fill(~mask | (ids == model.tokenizer.image_id), -100)
    return next_token_loss(model.lm.logits(hidden), labels)


def reference_step(model: Fromage, batch: Batch, paired: bool, weights: Weights = ALL) -> StepOutput:
    """Losses of one batch, by the two passes above. paired: whether two examples share a captioning sequence."""
    check_captions(model, batch)
    run = weights.captioning != 0
    captioning_loss, caption_accuracy = _captioning(model, batch, paired) if run else no_captioning(model.device)

    hidden, at_ret = model.hidden_at_ret(batch.ids, batch.lengths)  # (B, T, d), (B, d)
    text_loss, _ = next_token_loss(model.lm.logits(hidden), batch.ids.masked_fill(~_within(batch, behind=0), -100))

    images = model.embed_images(image_features(model, batch))  # (B, q); the authors encode each image twice
    texts = model.embed_ret(at_ret)  # (B, q)
    contrastive_loss, retrieval_accuracy = info_nce(images, texts, model.logit_scale)
    weight = device_weight(targets(batch), batch.ids.device)
    losses = captioning_loss * weight, text_loss * weight, contrastive_loss
    return StepOutput(*losses, caption_accuracy, retrieval_accuracy, images, texts, weights)
