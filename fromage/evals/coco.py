"""Captions and images find each other: COCO and Flickr30k, several captions for each image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fromage.evals.caption_sets import CaptionSet
from fromage.evals.captioning import caption_figures
from fromage.evals.clip import load_clip_baseline
from fromage.evals.report import Figures, System, make_report
from fromage.generation.generate import caption_images
from fromage.models.fromage import Fromage
from fromage.retrieval.encode import Options, encode_files, in_batches
from fromage.retrieval.metrics import chance, rank_figures, ranks

FOLD = 1000  # images of a gallery of the 1k protocol
PROTOCOL = {
    "text_to_image": "each caption against all images",
    "image_to_text": "each image against all captions; the best of its own counts",
    "..._1k": "mean over galleries of 1,000 images each, in the order of the file",
    "ranks": "exact; ties count against the model",
    "clip": "both towers of the frozen CLIP; captions beyond its 77 tokens are cut",
}
LISTED = {"coco": {"fromage": {"text_to_image": {"r1": 23.4}, "image_to_text": {"r1": 26.8}}}}
WHOSE = {"coco": {"in brackets": "a third party's listing, which neither the paper nor its authors confirm"}}


@torch.no_grad()
def evaluate(
    model: Fromage, data: CaptionSet, name: str = "coco", options: Options | None = None, captioning: bool = False
) -> dict[str, Any]:
    """Recalls both ways, in full and by thousands, of FROMAGe, of its CLIP and of chance.

    name: coco or flickr30k, for the published figures. captioning: caption every image as well, which takes longest.
    Raises UserError for too many images lost, and where what measures captions is not installed.
    """
    options = options or Options()
    if captioning:
        caption_figures([], [])  # fails at once where it must
    encoded = encode_files(model, data.images, options)
    kept = [(path, said) for path, said in zip(data.images, data.captions, strict=True) if path in encoded.row]
    texts = [text for _, said in kept for text in said]
    owner = torch.tensor([i for i, (_, said) in enumerate(kept) for _ in said], device=model.device)  # (texts,)
    features = encoded.of([path for path, _ in kept])  # (M, m)
    size = options.batch_size
    embedded = in_batches(model.embed_text, texts, size, "captions"), model.embed_images(features)
    systems = {"fromage": both_ways(*embedded, owner)}
    if options.clip:
        clip = load_clip_baseline(model)
        embedded = in_batches(clip.embed_text, texts, size, "captions, CLIP"), clip.embed_features(features)
        systems["clip"] = both_ways(*embedded, owner)
    systems["chance"] = by_chance(len(kept), len(texts), systems["fromage"])
    if captioning:
        made = caption_images(model, features, batch_size=size)
        systems["fromage"]["captioning"] = caption_figures(made, [said for _, said in kept])
    sizes = {"gallery": len(kept), "queries": len(texts)}
    paper, headline = LISTED.get(name, {}), ("text_to_image", "image_to_text")
    protocol = PROTOCOL | WHOSE.get(name, {})
    return make_report(name, model, systems, protocol, data.name, sizes, encoded, data.dropped, paper, headline)


def both_ways(texts: Tensor, images: Tensor, owner: Tensor) -> System:
    """Figures of texts (N, q) and images (M, q), unit rows, both ways; owner (N,) is the image of each text.

    From 2,000 images on, galleries of 1,000 are evaluated as well, as text_to_image_1k and image_to_text_1k.
    """
    system = _both_ways(texts, images, owner)
    folds = [_both_ways(*fold) for fold in _folds(texts, images, owner)]
    for way in list(system) if folds else ():
        system[f"{way}_1k"] = {name: sum(f[way][name] for f in folds) / len(folds) for name in system[way]}
    return system


def _both_ways(texts: Tensor, images: Tensor, owner: Tensor) -> System:
    own = torch.arange(len(images), device=images.device)
    return {
        "text_to_image": rank_figures(ranks(texts, images, owner)),
        "image_to_text": rank_figures(ranks(images, texts, own, labels=owner)),
    }


def _folds(texts: Tensor, images: Tensor, owner: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    starts = range(0, len(images) - FOLD + 1, FOLD) if len(images) >= 2 * FOLD else ()
    inside = [(start, (owner >= start) & (owner < start + FOLD)) for start in starts]
    return [(texts[here], images[start : start + FOLD], owner[here] - start) for start, here in inside]


def by_chance(images: int, captions: int, like: System) -> System:
    """Random order, for the settings of another system."""

    def figures(setting: str) -> Figures:
        gallery = min(FOLD, images) if setting.endswith("_1k") else images
        each = max(1, round(captions / images))
        return chance(gallery * each, each) if setting.startswith("image_to_text") else chance(gallery)

    return {setting: figures(setting) for setting in like}
