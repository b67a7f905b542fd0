"""COCO and Flickr30k: captions find images and images find captions, with several captions for each image.

Protocol: R@1, 5 and 10 and the median rank both ways over the whole gallery ("5k" for COCO's test split), and the mean over
galleries of 1,000 images ("1k"). FROMAGe's paper has no such table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fromage.evals import eccv
from fromage.evals.base import RetrievalRun, Retriever
from fromage.evals.caption_sets import CaptionSet
from fromage.evals.captioning import caption_figures, check_installed
from fromage.evals.options import Options
from fromage.evals.report import Report, System
from fromage.generation.generate import caption_decoding, caption_images
from fromage.models.fromage import Fromage
from fromage.retrieval.metrics import rank_figures, ranks

FOLD = 1000  # images of a gallery of the 1k protocol
WHOLE = 5000  # images of COCO's val and test sets
PROTOCOL = {
    "text_to_image": "each caption against all images",
    "image_to_text": "each image against all captions; the best of its own counts",
    "..._1k": "mean over galleries of 1,000 images each, in the order of the file; those left over at its end are in none",
    "ranks": "exact; ties count against the model",
    "clip": "both towers of the frozen CLIP; captions are cut at the length of its context (OpenAI's: 77 tokens)",
}
HEADLINE = ("text_to_image", "image_to_text")
LISTED = {"fromage": {"text_to_image": {"r1": 23.4}, "image_to_text": {"r1": 26.8}}}
LISTED_BY = {"in brackets": "a third party's listing, which neither the paper nor its authors confirm"}


@torch.no_grad()
def evaluate(model: Fromage, data: CaptionSet, options: Options | None = None, captioning: bool = False) -> Report:
    """Recalls both ways of FROMAGe, CLIP and chance, in percent.

    captioning: caption every image too, which takes longest; see fromage.evals.captioning.
    Raises UserError for too many images lost, and where what measures captions is not installed.
    """
    if captioning:
        check_installed()
    run = RetrievalRun(model, data.name, data.images, options)
    kept = run.keep(list(zip(data.images, data.captions, strict=True)), lambda pair: pair[:1])
    texts = [text for _, captions in kept for text in captions]
    owner = torch.tensor([i for i, (_, captions) in enumerate(kept) for _ in captions], device=model.device)  # (N,)
    features = run.encoded.of([path for path, _ in kept])  # (M, m)
    each = max(1, round(len(texts) / len(kept)))

    numbers = data.numbers if len(kept) == len(data.images) else None
    beyond: dict[str, System] = {}

    def recalls(system: Retriever) -> System:
        rows, images = system.embed_text(texts, "captions"), system.embed_images(features)  # (N, e), (M, e)
        if numbers:
            beyond[system.name] = eccv.figures(rows, images, numbers)
        return both_ways(rows, images, owner)

    figures = run.compare(recalls, lambda setting: gallery_of(setting, len(kept), each))
    if numbers:
        beyond["chance"] = eccv.chance_figures(numbers)
        figures = {who: settings | beyond[who] for who, settings in figures.items()}
    if captioning:
        made = caption_images(model, features, batch_size=run.options.batch_size)
        figures["fromage"]["captioning"] = caption_figures(made, [captions for _, captions in kept])
    sizes = {"gallery": len(kept), "queries": len(texts)}
    whole = data.dataset == "coco" and len(kept) == WHOLE
    protocol, listed = (PROTOCOL | LISTED_BY, LISTED) if whole else (dict(PROTOCOL), {})
    if captioning:
        after = f" after {model.config.input_prompt!r}, which is not part of them" if model.config.input_prompt else ""
        how = caption_decoding(model)
        ends = f"of at most {how.max_new_tokens} tokens, which end at {', '.join(map(repr, how.stop))}"
        protocol |= {"captioning": f"greedy captions{after}, {ends}, against all of the image's"}
    if data.numbers:
        protocol |= eccv.PROTOCOL if numbers else {"eccv": "left out, since some of its images were lost"}
    return run.report(data.dataset, figures, sizes, data.dropped, protocol, listed, HEADLINE)


def both_ways(texts: Tensor, images: Tensor, owner: Tensor) -> System:
    """Figures of texts (N, e) and images (M, e), unit rows, both ways; owner (N,) is the image of each text.

    From 2,000 images on, the settings text_to_image_1k and image_to_text_1k are evaluated too.
    """
    system = _recalls(texts, images, owner)
    if len(images) < 2 * FOLD:
        return system
    folds = []
    for start in range(0, len(images) - FOLD + 1, FOLD):
        here = (owner >= start) & (owner < start + FOLD)  # (N,)
        folds.append(_recalls(texts[here], images[start : start + FOLD], owner[here] - start))
    means = {way: {name: sum(f[way][name] for f in folds) / len(folds) for name in system[way]} for way in system}
    return system | {f"{way}_1k": figures for way, figures in means.items()}


def _recalls(texts: Tensor, images: Tensor, owner: Tensor) -> System:
    own = torch.arange(len(images), device=images.device)  # (M,)
    return {
        "text_to_image": rank_figures(ranks(texts, images, owner)),
        "image_to_text": rank_figures(ranks(images, texts, own, labels=owner)),
    }


def gallery_of(setting: str, images: int, each: int) -> tuple[int, int]:
    """Items of a setting's gallery, and how many of them are a query's own; of `each` captions an image."""
    gallery = min(FOLD, images) if setting.endswith("_1k") else images
    return (gallery * each, each) if setting.startswith("image_to_text") else (gallery, 1)
