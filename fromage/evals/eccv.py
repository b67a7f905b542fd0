"""ECCV Caption and CxC: captions and images of COCO's test split that belong together though COCO does not say so.

    CxC           people judged how alike captions and images of the split are (Parekh et al., EACL 2021)
    ECCV Caption  people verified what five models found for 1,332 captions and 1,261 images (Chun et al., ECCV 2022)

The lists, and the program that counts, are those of the package eccv_caption: 5,000 images and 25,000 captions of val2014.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from fromage.data.annotation_formats import read_annotations
from fromage.data.annotations import FILE, ID, TEXT, fitting
from fromage.distribution import pip_install
from fromage.errors import UserError
from fromage.evals.caption_sets import CaptionSet, Numbers
from fromage.evals.report import System
from fromage.images.regions import below
from fromage.retrieval.metrics import best, chance_average_precision, chance_within

NAMED = "captions_val2014.json"
KS = (1, 5, 10)
COUNTED = ("r1", "rprecision", "map_at_r")
WAYS = {"text_to_image": "t2i", "image_to_text": "i2t"}
PROTOCOL = {
    "eccv_...": "the queries and right items of ECCV Caption: R@1, and R-precision and mAP@R for R right items",
    "cxc_...": "recall with the right items of CxC",
}


def scorer() -> Any:
    """The package's lists and counting. Raises UserError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it reads JSON by Python's own module
            from eccv_caption import Metrics
    except ImportError as error:
        raise UserError(f"ECCV Caption is counted by the package eccv_caption: {pip_install('evals')}") from error
    return Metrics()


def read_test(annotations: Path, images: Path) -> CaptionSet:
    """The test images and their captions, with their numbers, out of captions_val2014.json.

    They are in the order of the package's list of captions, whose thousands are the folds of the 1k protocol.
    Raises UserError for a file that lacks some of them, and as read_caption_set does.
    """
    _, content = read_annotations(annotations, ("captions of COCO",), NAMED)
    shown = fitting(annotations, "images", content["images"], {"id": ID, "file_name": FILE})
    said = fitting(annotations, "annotations", content["annotations"], {"id": ID, "caption": TEXT})
    files, texts = {each["id"]: each["file_name"] for each in shown}, {each["id"]: each["caption"] for each in said}
    metrics = scorer()
    image_of, order = metrics.coco_gts["t2i"], metrics.coco_ids.tolist()  # captions
    listed: dict[int, list[int]] = {}  # captions of each image
    for text in order:
        listed.setdefault(image_of[text][0], []).append(text)
    lacking = sum(i not in files for i in listed) + sum(i not in texts for own in listed.values() for i in own)
    if lacking:
        raise UserError(f"{annotations}: lacks {lacking} images and captions of COCO's test split; name {NAMED}")
    return CaptionSet(
        f"{annotations.name}, ECCV Caption's test split",
        [below(images, files[i]) for i in listed],
        [[texts[i].strip() for i in own] for own in listed.values()],
        numbers=Numbers([*listed], [i for own in listed.values() for i in own]),
    )


def figures(texts: Tensor, images: Tensor, numbers: Numbers) -> System:
    """texts (N, e) and images (M, e), unit rows, of these captions and images -> figures both ways, in percent."""
    metrics = scorer()
    right = [own for lists in (metrics.eccv_gts, metrics.cxc_gts) for way in lists.values() for own in way.values()]
    most = max(*KS, *map(len, right))
    found = {
        "t2i": _nearest(texts, images, numbers.texts, numbers.images, most),
        "i2t": _nearest(images, texts, numbers.images, numbers.texts, most),
    }
    counted = metrics.eccv_metrics(found, "all")
    recalls = {f"r{k}": metrics.cxc_recalls(found, "all", K=k) for k in KS}
    system: System = {}
    for way, short in WAYS.items():
        system[f"eccv_{way}"] = {name: 100 * float(counted[f"eccv_{name}"][short]) for name in COUNTED}
        system[f"cxc_{way}"] = {name: 100 * float(recall[short]) for name, recall in recalls.items()}
    return system


def _nearest(queries: Tensor, gallery: Tensor, own: list[int], theirs: list[int], most: int) -> dict[int, list[int]]:
    """Each query's number -> numbers of the items nearest to it, the best first."""
    found = best(queries, gallery, most)
    return {number: [theirs[item] for item in items] for number, items in zip(own, found, strict=True)}


def chance_figures(numbers: Numbers) -> System:
    """Figures expected of a random order, in percent."""
    metrics, system = scorer(), System()
    for way, short in WAYS.items():
        count = len(numbers.images if short == "t2i" else numbers.texts)
        rights = [len(set(own)) for own in metrics.eccv_gts[short].values()]
        first = 100 * fmean(chance_within(1, count, right) for right in rights)
        precision = fmean(chance_average_precision(count, right, (right,))[f"map{right}"] for right in rights)
        system[f"eccv_{way}"] = dict(zip(COUNTED, (first, first, precision), strict=True))
        rights = [len(set(own)) for own in metrics.cxc_gts[short].values()]
        system[f"cxc_{way}"] = {f"r{k}": 100 * fmean(chance_within(k, count, right) for right in rights) for k in KS}
    return system
