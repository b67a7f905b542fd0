"""Recall on validation batches: single captions and images of one gallery, by FROMAGe and by the frozen CLIP."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fromage.data.batches import Batch
from fromage.evals.clip import load_clip_baseline
from fromage.models.fromage import Fromage
from fromage.retrieval.metrics import retrieval_recalls
from fromage.training.reference_step import image_features


def evaluate(model: Fromage, batches: Iterable[Batch]) -> dict[str, float]:
    """t2i_r1, i2t_r1 and on, in percent, of all pairs of the batches: each caption, read at [RET], against all images."""

    def embed_text(batch: Batch) -> Tensor:
        return model.embed_ret(model.hidden_at_ret(batch.ids.to(model.device), batch.lengths)[1])  # (B, T) -> (B, q)

    return _recalls(model, batches, embed_text, model.embed_images)


def evaluate_clip(model: Fromage, batches: Iterable[Batch]) -> dict[str, float]:
    """The same figures for the frozen CLIP whose image tower the model has; captions beyond its limit are cut.

    Raises UserError for a vision tower without text tower.
    """
    clip = load_clip_baseline(model)
    return _recalls(model, batches, lambda batch: clip.embed_text(batch.captions), clip.embed_features)


@torch.no_grad()
def _recalls(
    model: Fromage, batches: Iterable[Batch], embed_text: Callable[[Batch], Tensor], embed_images: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    rows = [(embed_text(batch), embed_images(image_features(model, batch))) for batch in batches]  # (B, e) each
    texts, images = (torch.cat(some) for some in zip(*rows, strict=True))  # (N, e)
    return retrieval_recalls(texts, images)
