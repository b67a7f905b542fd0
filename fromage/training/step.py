"""What all training steps share: weights of the losses, what a step gives, and what it reads of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from fromage.data.batches import Batch, FurtherTexts
from fromage.data.sample_images import Images
from fromage.data.tuples import TupleBatch
from fromage.errors import UserError, first_few
from fromage.models.fromage import Fromage
from fromage.models.packed_layout import to_device
from fromage.training.losses import info_nce

T = TypeVar("T")


class LossWeights(NamedTuple):
    """Weights of the losses, and what counts in them. A pass of weight 0 is not run; see `runs_retrieval`.

    Those of composition learning are losses of fromage.training.reference_composition.
    """

    captioning: float = 1.0
    retrieval: float = 1.0  # of its next-token loss and InfoNCE
    same_image_negatives: bool = True  # whether other captions of an image are its negatives
    composition_captioning: float = 0.0
    composition_retrieval: float = 0.0
    captioned_share: float = 1.0  # of the examples, the first of a batch: those that the captioning pass reads

    def captioned(self, model: Fromage, batch: Batch) -> int:
        """Number of a batch's first examples that the captioning pass reads: even, or all; there is a word among them."""
        B, n = len(batch.lengths), round(self.captioned_share * len(batch.lengths))
        worded = next(i for i, length in enumerate(batch.lengths) if length > len(model.tokenizer.start()) + model.r)
        n = max(n, worded + 1)
        return min(n + n % 2, B)

    @property
    def runs_retrieval(self) -> bool:
        """Whether the retrieval pass is run: at weight 0 only without gradients, for the figures of a validation."""
        return self.retrieval != 0 or not torch.is_grad_enabled()

    @property
    def composes(self) -> bool:
        """Whether anything is learned from tuples."""
        return self.composition_captioning != 0 or self.composition_retrieval != 0


PAPER_WEIGHTS = LossWeights()


def freeze_unused(model: Fromage, weights: LossWeights, freeze_temperature: bool = False) -> None:
    """Freeze the prefix, heads, fusion and temperature that no loss of these weights trains, and train the others."""
    finding = weights.retrieval + weights.composition_retrieval > 0
    model.visual_prefix.requires_grad_(weights.captioning > 0 or weights.composes)
    for part in (model.text_head, model.image_head, model.fusion):
        part.requires_grad_(finding)
    if model.config.space == "clip":
        model.image_head.requires_grad_(False)
    model.logit_scale.requires_grad_(finding and not freeze_temperature)
    reads_ret = finding and not model.pools_last_word  # whether [RET] is an input; if tied, it is a row of the head too
    model.ret.input.requires_grad_(reads_ret or model.ret.tied)


@dataclass
class StepOutput:
    """Three losses and two accuracies (0 to 1), all scalars; image and text embeddings, (B, q) unit rows.

    Attributes:
        caption_accuracy: token accuracy of captioning.
        retrieval_accuracy: share of pairs that rank first within the batch, averaged over both directions.

    Of a pass that was not run, losses and accuracy are 0, and embeddings have no rows.
    """

    captioning_loss: Tensor
    text_loss: Tensor
    contrastive_loss: Tensor
    caption_accuracy: Tensor
    retrieval_accuracy: Tensor
    images: Tensor
    texts: Tensor
    weights: LossWeights

    @property
    def loss(self) -> Tensor:
        """Their weighted sum."""
        retrieval = self.text_loss + self.contrastive_loss
        return self.weights.captioning * self.captioning_loss + self.weights.retrieval * retrieval


@record_function("the vision tower")
def image_features(model: Fromage, batch: Batch | TupleBatch | Images) -> Tensor:
    """(B, m) image features: the stored ones if the batch has them, else computed by the tower."""
    return batch.features.to(model.device) if batch.features is not None else model.vision(batch.pixels)


def text_embeddings(model: Fromage, texts: Batch | FurtherTexts) -> Tensor:
    """(B, q) unit rows of captions, read at [RET]."""
    return model.embed_ret(model.hidden_of_texts(texts.ids.to(model.device), texts.lengths)[1])  # (B, T) -> (B, q)


def count_targets(model: Fromage, batch: Batch) -> int:
    """Number of targets of captioning: all tokens of the captions except r each, and a start token that stands first."""
    return count_text_targets(model, batch) - model.start_first * len(batch.lengths)


def count_text_targets(model: Fromage, texts: Batch) -> int:
    """Number of targets of the retrieval pass, whose texts are batch.queries: all their tokens except r each."""
    return sum(texts.lengths) - model.r * len(texts.lengths)


def check_captions(model: Fromage, batch: Batch) -> None:
    """Raise UserError if no caption of the batch has a word."""
    if max(batch.lengths) <= len(model.tokenizer.start()) + model.r:
        remedy = "correct the txt files of the shards, or raise max_tokens"
        raise UserError(f"no caption of this batch has a word (samples {first_few(batch.keys)}): {remedy}")


def not_run(device: torch.device) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of a pass that is not run: 0."""
    return torch.zeros((), device=device), torch.zeros((), device=device)


def contrast(
    model: Fromage, features: Tensor, texts: Tensor, weights: LossWeights, dropout: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """InfoNCE of image features (B, m) and text embeddings (B, q), its accuracy, and the image embeddings (B, q).

    dropout: factors on the features that the image head reads.
    """
    if not weights.runs_retrieval:
        return *not_run(model.device), texts
    with record_function("the contrastive loss"):
        images = model.embed_images(dropped(features, dropout))  # (B, q)
        apart = None if weights.same_image_negatives else features
        return *info_nce(images, texts, model.logit_scale, apart), images


def dropped(features: Tensor, factors: Tensor | None) -> Tensor:
    """(B, m) image features after dropout, by its factors."""
    return features if factors is None else features * to_device(factors, features.device)


def recomputed(run: Callable[..., T]) -> Callable[..., T]:
    """The same function, whose activations are not kept for the backward: it runs again there."""
    return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
