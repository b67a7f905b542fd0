"""The losses of composition learning as their formulas have them; the reference for fast_composition.

An image and a condition ask for another image. Two padded passes through the language model, both with a full backward:

    captioning   [W_c v(x)] [</s> c_1 ... c_a] [y_1 ... y_b]     next-token loss on the target caption alone
    retrieval    [W_c v(x)] [</s> c_1 ... c_a] [RET]             InfoNCE of W_t h_[RET] with what is asked for

What is asked for is the target image where a tuple has one, W_i v(x'). Where it has none, CLIP's text embedding of the
target caption stands for it; that lies in CLIP's joint space, so the model must have space 'clip'. The sequence is that of
a prompt of an image and a text (Starts.ONCE, fromage.models.prompts), so a query is read as it was trained. The retrieval
pass has no next-token loss: that [RET] follows a text is learned from captions.

Source: L_mc-cap and L_mc-ret of Li et al., "Improving Context Understanding in Multimodal Large Language Models via
Multimodal Composition Learning" (MCL), ICML 2024, section 3. It has no target images. Its text tower is CLIP's, as here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fromage.data.padding import pad
from fromage.data.tuples import NO_IMAGE, TupleBatch
from fromage.errors import UserError, first_few
from fromage.models.fromage import Fromage
from fromage.models.packed_layout import to_device
from fromage.models.vision.base import TextTower
from fromage.training.losses import device_weight, info_nce, next_token_loss
from fromage.training.step import LossWeights, image_features

NO_TUPLES = "model.composition_captioning_weight, model.composition_retrieval_weight: the data has no tuples; "
NO_TUPLES += "give data.train_tuples, or leave both weights at 0"


@dataclass
class CompositionOutput:
    """The two losses and accuracies (0 to 1), all scalars; 0 where a pass is not run.

    Attributes:
        caption_accuracy: token accuracy of the target captions.
        retrieval_accuracy: share of tuples that rank first within the batch, averaged over both directions.
    """

    captioning_loss: Tensor
    contrastive_loss: Tensor
    caption_accuracy: Tensor
    retrieval_accuracy: Tensor
    weights: LossWeights

    @property
    def loss(self) -> Tensor:
        """Their weighted sum."""
        weights = self.weights
        return weights.composition_captioning * self.captioning_loss + weights.composition_retrieval * self.contrastive_loss

    def figures(self) -> dict[str, Tensor]:
        """What is logged, by name."""
        shown = ("captioning_loss", "contrastive_loss", "caption_accuracy", "retrieval_accuracy")
        return {name: getattr(self, name).detach() for name in shown}


def reference_composition(
    model: Fromage, tuples: TupleBatch, weights: LossWeights, text_tower: TextTower | None = None
) -> CompositionOutput:
    """Losses of a batch of tuples, by the two passes above.

    text_tower: CLIP's, for tuples without target image. Raises UserError for such tuples in a space of our own.
    """
    nothing = torch.zeros((), device=model.device)
    captioning_loss, caption_accuracy, contrastive_loss, retrieval_accuracy = [nothing] * 4
    prefix = model.visual_prefix(image_features(model, tuples))  # (B, m) -> (B, k, d)
    first = int(model.start_first)
    trunks = [
        [*row[:first], *[model.tokenizer.image_id] * model.k, *row[first : n - model.r]]
        for row, n in zip(tuples.conditions.tolist(), tuples.lengths, strict=True)
    ]
    if weights.composition_captioning:
        said = [row[:n] for row, n in zip(tuples.captions.tolist(), tuples.caption_lengths, strict=True)]
        ids, mask = _padded(model, [trunk + target for trunk, target in zip(trunks, said, strict=True)])  # (B, k + T)
        labels = _after(ids, [len(trunk) for trunk in trunks], mask)  # (B, k + T)
        hidden = model.lm(model.embed(ids, prefix), mask)  # (B, k + T, d)
        captioning_loss, caption_accuracy = next_token_loss(model.lm.logits(hidden), labels)
        captioning_loss = captioning_loss * device_weight(sum(tuples.caption_lengths), model.device)
    if weights.composition_retrieval:
        ids, mask = _padded(model, [trunk + model.tokenizer.ret_ids for trunk in trunks])  # (B, k + T)
        hidden = model.lm(model.embed(ids, prefix), mask, model.positions(ids, mask))  # (B, k + T, d)
        text_states = model.text_states(
            hidden, torch.tensor([len(trunk) for trunk in trunks], device=ids.device)
        )  # (B, r, d)
        contrastive_loss, retrieval_accuracy = composition_info_nce(
            model, model.embed_ret(text_states), target_embeddings(model, tuples, text_tower), weights
        )
    return CompositionOutput(captioning_loss, contrastive_loss, caption_accuracy, retrieval_accuracy, weights)


def _padded(model: Fromage, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids -> (B, T) and their bool mask (B, T), right-padded."""
    ids, mask = pad(rows, model.tokenizer.pad_id)
    return ids.to(model.device), mask.to(model.device)


def _after(ids: Tensor, starts: list[int], mask: Tensor) -> Tensor:
    """(B, T) ids -> (B, T) labels: those after each start; -100 elsewhere and at padding."""
    begins = torch.tensor(starts, device=ids.device).unsqueeze(1)  # (B, 1)
    return ids.masked_fill(~mask | (torch.arange(ids.shape[1], device=ids.device) < begins), -100)


def target_embeddings(model: Fromage, tuples: TupleBatch, text_tower: TextTower | None) -> Tensor:
    """(B, q) unit rows of what tuples ask for: the target image, or else CLIP's text embedding of the target caption.

    The gradient reaches W_i where the space is learned. Raises UserError as reference_composition does.
    """
    without = sorted(set(range(len(tuples.keys))) - set(tuples.target_rows))
    if without and (text_tower is None or model.config.space != "clip"):
        raise UserError(f"{first_few([tuples.keys[i] for i in without])}: {NO_IMAGE}")
    rows = torch.zeros(len(tuples.keys), model.q, device=model.device)  # (B, q)
    if tuples.target_images is not None:
        images = model.embed_images(image_features(model, tuples.target_images))  # (n, m) -> (n, q)
        rows = rows.index_copy(0, to_device(tuples.target_rows, model.device), images)
    if without and text_tower is not None:
        texts = text_tower.embed_text([tuples.targets[i] for i in without])  # (B - n, q)
        rows = rows.index_copy(0, to_device(without, model.device), texts.to(rows.device))
    return rows


def composition_info_nce(model: Fromage, queries: Tensor, rows: Tensor, weights: LossWeights) -> tuple[Tensor, Tensor]:
    """InfoNCE of queries (B, q), read at [RET], with what they ask for (B, q), and its accuracy.

    Without weights.same_image_negatives, rows that are equal are no negatives of one another.
    """
    return info_nce(rows, queries, model.logit_scale, None if weights.same_image_negatives else rows.detach())
