"""Recall on validation batches: their captions and images as one gallery, by FROMAGe and by the frozen CLIP."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fromage.data.batches import Batch, FurtherTexts
from fromage.errors import UserError
from fromage.evals.base import no_baseline
from fromage.models.fromage import Fromage
from fromage.retrieval.metrics import Gallery, joined, retrieval_recalls
from fromage.training.step import image_features, text_embeddings


def evaluate(model: Fromage, batches: Iterable[Batch]) -> dict[str, float]:
    """t2i_r1, i2t_r1 and on, in percent, of all captions of the batches, read at [RET], and all their images."""
    return _recalls(model, batches, lambda texts: text_embeddings(model, texts), model.embed_images)


def evaluate_clip(model: Fromage, batches: Iterable[Batch]) -> dict[str, float]:
    """The same figures for the frozen CLIP whose vision tower the model has; captions beyond its limit are cut.

    Raises UserError for a vision tower without text tower.
    """
    clip = model.vision.text_tower()
    if clip is None:
        raise UserError(no_baseline(model))
    return _recalls(model, batches, lambda texts: clip.embed_text(texts.captions), clip.embed_features)


@torch.no_grad()
def _recalls(
    model: Fromage,
    batches: Iterable[Batch],
    embed_text: Callable[[Batch | FurtherTexts], Tensor],
    embed_images: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    parts = []
    for batch in batches:
        texts = torch.cat([embed_text(batch), *map(embed_text, batch.others())])  # (N, e)
        parts.append(Gallery(texts, embed_images(image_features(model, batch)), batch.owners))
    return retrieval_recalls(*joined(parts))
