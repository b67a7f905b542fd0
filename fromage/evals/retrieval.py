"""Single captions against a gallery of pictures, and the frozen CLIP's own two towers on the same gallery."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fromage.data import Batch
from fromage.metrics import retrieval_recalls
from fromage.model import Fromage
from fromage.plain_step import image_features


@torch.no_grad()
def evaluate(model: Fromage, batches: Iterable[Batch]) -> dict[str, float]:
    """Recall@1/5/10 both ways, in percent, of all pairs of the batches: each caption with [RET] against all pictures."""
    texts, images = [], []
    for batch in batches:
        texts.append(model.embed_ret(model.hidden_at_ret(batch.ids.to(model.device), batch.lengths)[1]))
        images.append(model.embed_images(image_features(model, batch)))
    return retrieval_recalls(torch.cat(texts), torch.cat(images))


@torch.no_grad()
def evaluate_clip(clip: Any, tokenizer: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """The same figures for an open_clip model whole (fromage.backbones.load_clip); texts over its limit are cut."""
    texts, images = [], []
    for batch in batches:
        texts.append(F.normalize(clip.encode_text(tokenizer(batch.captions)).float(), dim=-1))
        pixels = cast(Tensor, batch.pixels).to(next(clip.visual.parameters()).dtype)
        images.append(F.normalize(clip.encode_image(pixels).float(), dim=-1))
    return retrieval_recalls(torch.cat(texts), torch.cat(images))
