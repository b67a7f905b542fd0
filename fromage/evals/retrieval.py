"""Single captions against a gallery of images, and the frozen CLIP's own two towers on the same gallery."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fromage.data.batches import Batch
from fromage.evals.clip import load_clip_baseline
from fromage.models.fromage import Fromage
from fromage.retrieval.metrics import retrieval_recalls
from fromage.training.reference_step import image_features


@torch.no_grad()
def evaluate(model: Fromage, batches: Iterable[Batch]) -> dict[str, float]:
    """Recall@1/5/10 both ways, in percent, of all pairs of the batches: each caption with [RET] against all images."""
    texts, images = [], []
    for batch in batches:
        texts.append(model.embed_ret(model.hidden_at_ret(batch.ids.to(model.device), batch.lengths)[1]))
        images.append(model.embed_images(image_features(model, batch)))
    return retrieval_recalls(torch.cat(texts), torch.cat(images))


@torch.no_grad()
def evaluate_clip(model: Fromage, batches: Iterable[Batch]) -> dict[str, float]:
    """The same figures for the frozen CLIP whose image tower the model has; texts over its limit are cut."""
    clip, texts, images = load_clip_baseline(model), [], []
    for batch in batches:
        texts.append(clip.embed_text(batch.captions))
        images.append(clip.embed_features(image_features(model, batch)))
    return retrieval_recalls(torch.cat(texts), torch.cat(images))
