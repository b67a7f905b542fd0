"""What a validation of FROMAGe gathers over its batches: recalls of the whole set, and contact sheets of some images."""

from __future__ import annotations

import warnings
from functools import cached_property

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from fromage.data.batches import Batch
from fromage.generation.generate import caption_images
from fromage.images.contact_sheet import contact_sheet
from fromage.images.transforms import to_image
from fromage.models.fromage import Fromage
from fromage.retrieval.metrics import Gallery, joined, retrieval_recalls
from fromage.training.gather import gathered
from fromage.training.step import StepOutput, image_features, text_embeddings

SHOWN_FROM = 200  # images of the validation set that the logged searches rank


class Validation:
    """One validation: embeddings of all captions and images, and the first images with their first captions."""

    def __init__(self, model: Fromage) -> None:
        self.model = model
        self._parts: list[Gallery] = []
        self._to_show: list[tuple[str, Tensor, Tensor | None]] = []  # caption, features (m,), pixels (3, H, W)

    def add(self, out: StepOutput, batch: Batch) -> None:
        """Keep the embeddings of a batch: those of the step, and of the images' other captions."""
        texts = torch.cat([out.texts, *(text_embeddings(self.model, some) for some in batch.others())])  # (N, q)
        self._parts.append(Gallery(texts, out.images, batch.owners))
        if len(self._to_show) < SHOWN_FROM:
            features = image_features(self.model, batch).cpu()  # (B, m)
            pixels = [None] * len(features) if batch.pixels is None else list(batch.pixels.cpu())
            self._to_show += zip(batch.captions, features, pixels, strict=True)

    @cached_property
    def gallery(self) -> Gallery:
        """All embeddings, of all devices, which must ask for them together; after the last batch."""
        return joined(gathered([part.to("cpu") for part in self._parts] if dist.is_initialized() else self._parts))

    def recalls(self) -> dict[str, float]:
        """Recall@1/5/10 in both directions, in percent; warns of images that are there twice.

        An image is found by each of its captions, and finds any of them.
        """
        images = self.gallery.images  # (N, q)
        if copies := len(images) - len(images.unique(dim=0)):
            found = f"{copies} of {len(images)} validation images equal another, so recall counts them as not found"
            warnings.warn(f"{found}: pack each image once with all its captions (fromage shards)", stacklevel=2)
        return retrieval_recalls(*self.gallery)

    def sheets(self, shown: int) -> dict[str, Image.Image]:
        """Contact sheets of the first images, at most `shown`, by name.

        "captions": images with their generated captions. "search": their first captions as queries, with the five images
        found for each.
        """
        texts = {owner: row for row, owner in reversed(list(enumerate(self.gallery.owners.tolist())))}  # an image's first
        thumbnails = [None if pixels is None else to_image(pixels) for _, _, pixels in self._to_show]
        some = self._to_show[:shown]
        made = caption_images(self.model, torch.stack([features for _, features, _ in some]).to(self.model.device))
        captioned = [(f"true: {caption}", [(thumbnails[i], made[i])]) for i, (caption, _, _) in enumerate(some)]
        found = []
        for i, (caption, _, _) in enumerate(some):
            query, images = self.gallery.texts[texts[i]], self.gallery.images[: len(thumbnails)]  # (q,), (n, q)
            scores, best = (query @ images.T).topk(min(5, len(thumbnails)))
            found.append((caption, [(thumbnails[j], f"{s:.2f}") for s, j in zip(scores, best, strict=True)]))
        return {"captions": contact_sheet(captioned), "search": contact_sheet(found)}
