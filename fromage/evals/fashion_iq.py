"""FashionIQ: composed retrieval of dresses, shirts and tops (Wu et al., CVPR 2021).

R@10 and R@50 of each kind, in the images of its split, and their mean. The two captions of a query are one text.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fromage.data.annotation_formats import read_annotations
from fromage.data.annotations import FILE, TEXT, Schema, fitting
from fromage.errors import UserError
from fromage.evals.composed import Composed, ComposedRun, ComposedSet, with_mean
from fromage.evals.contextual import RetrievalTask, recalls
from fromage.evals.options import Options
from fromage.evals.report import Report
from fromage.images.regions import Place, named
from fromage.models.fromage import Fromage

KINDS = ("dress", "shirt", "toptee")
QUERY: Schema = {"target": FILE, "candidate": FILE, "captions": [TEXT]}
RECALL = (10, 50)
PROTOCOL = {
    "gallery": "all images of the kind's split, the query's own too, as in the start kit",
    "words": "both captions, joined by 'and', without what ends them",
    "mean": "over the kinds",
}


def read_fashion_iq(folder: Path, images: Path, limit: int | None = None) -> list[ComposedSet]:
    """The validation set of each kind that the folder has, with images/B0084Y8XIU.jpg (.png ...).

    Args:
        folder: FashionIQ's, with captions/cap.KIND.val.json and image_splits/split.KIND.val.json.
        images: folder of the images.
        limit: queries of each kind at most; None for all.

    Raises UserError for a folder without such files, and for files that are broken or of another kind.
    """
    sets = []
    for kind in KINDS:
        captions, listed = folder / f"captions/cap.{kind}.val.json", folder / f"image_splits/split.{kind}.val.json"
        if captions.is_file():
            sets.append(_read_kind(kind, captions, listed, images, limit))
    if not sets:
        remedy = "a folder of FashionIQ, with captions and image_splits"
        raise UserError(f"{folder}: holds no captions/cap.{KINDS[0]}.val.json; name {remedy}")
    return sets


def _read_kind(kind: str, captions: Path, listed: Path, images: Path, limit: int | None) -> ComposedSet:
    _, content = read_annotations(captions, ("captions of FashionIQ",), f"{captions.name} of FashionIQ")
    _, split = read_annotations(listed, ("a list of images",), f"{listed.name} of FashionIQ")
    places: dict[str, Place] = {name: named(images, name) for name in split if FILE.fits(name)}
    queries = []
    for number, query in enumerate(fitting(captions, "captions", content, QUERY)[:limit]):
        reference, target, words = query["candidate"], query["target"], joined(query["captions"])
        if lacking := [name for name in (reference, target) if name not in places]:
            raise UserError(f"{listed}: lacks image {lacking[0]}; take both files of one split")
        if words:
            queries.append(Composed(f"{kind} {number}", places[reference], words, (places[target],)))
    if not queries:
        raise UserError(f"{captions}: holds no query; fetch the file again")
    return ComposedSet(kind, queries, list(places.values()))


def joined(captions: list[str]) -> str:
    """The captions of a query as one text: 'is shiny and has shorter sleeves and fit and flare'."""
    return " and ".join(filter(None, (text.strip(" .?,") for text in captions)))


@torch.no_grad()
def evaluate(model: Fromage, data: list[ComposedSet], options: Options | None = None) -> Report:
    """R@10 and R@50 of each kind and their mean, of FROMAGe, CLIP (image, text, sum) and chance, in percent.

    Raises UserError for too many images lost.
    """
    run = ComposedRun(model, ", ".join(some.name for some in data), data, options)
    tasks: dict[str, RetrievalTask] = {}
    for part in run.parts:
        tasks |= part.tasks(part.data.name, measure=recalls(*RECALL))
    figures = with_mean(run.evaluate(tasks), [some.name for some in data])
    return run.told_of("fashioniq", figures, PROTOCOL, {}, "MCL's table has no FashionIQ", list(figures["fromage"]))
