"""CIRR: composed retrieval on the images of NLVR2 (Liu et al., ICCV 2021).

Two galleries: all images of the split but the query's own, and the five that stand beside it in a set of like ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fromage.data.annotation_formats import read_annotations
from fromage.data.annotations import FILE, TEXT, WHOLE, Schema, fitting, optional
from fromage.errors import UserError
from fromage.evals.composed import ASKED, Composed, ComposedRun, ComposedSet, write_server_files
from fromage.evals.contextual import recalls
from fromage.evals.options import Options
from fromage.evals.report import Report, System
from fromage.images.regions import Place, below
from fromage.models.fromage import Fromage
from fromage.retrieval.metrics import Scope

QUERY: Schema = {
    "pairid": WHOLE,
    "reference": FILE,
    "target_hard": optional(FILE),
    "caption": TEXT,  # one of test1 is blank
    "img_set": {"members": [FILE]},
}
OFFICIAL = {4181, 4148}  # pairs of val and test1
RECALL, SUBSET = (1, 5, 10, 50), (1, 2, 3)
FILES = {"all": ("recall", RECALL[-1]), "subset": ("recall_subset", SUBSET[-1])}  # metric, and images of an answer


def _row(all1: float, all5: float, all50: float, subset1: float, ending: str = ASKED) -> System:
    return {"all" + ending: {"r1": all1, "r5": all5, "r50": all50}, "subset" + ending: {"r1": subset1}}


PAPER: dict[str, System] = {  # of MCL's table
    "fromage": _row(10.96, 31.40, 72.97, 34.07),
    "clip": _row(12.27, 35.81, 77.04, 33.33, ""),
    "clip image": _row(7.13, 23.04, 56.63, 20.55, ""),
    "clip text": _row(20.55, 44.17, 78.94, 60.74, ""),
    "MCL OPT-2.7B": _row(23.28, 54.17, 90.05, 58.24),
    "MCL OPT-6.7B": _row(24.15, 55.98, 90.92, 59.52),
    "MCL Llama-2-7B": _row(26.22, 56.84, 91.35, 61.45),
}
PROTOCOL = {
    "all": "the images of the split but the query's own",
    "subset": "the five other images of the query's set",
}
PUBLISHED = (
    "MCL's table (Li et al., ICML 2024), FROMAGe with OPT-6.7B; of test1, whose answers the server alone knows, and shown "
    "beside val too"
)


def read_cirr(annotations: Path, gallery: Path, images: Path, limit: int | None = None) -> ComposedSet:
    """The pairs of a split.

    Args:
        annotations: captions/cap.rc2.val.json or cap.rc2.test1.json.
        gallery: image_splits/split.rc2.val.json, names of the images and where they are.
        images: the folder that these places are relative to, or the one that holds the split's images themselves.
        limit: pairs at most; None for all.

    Raises UserError for files that are missing, broken or of another kind, and for pairs whose images the gallery lacks.
    """
    wanted = "cap.rc2.val.json or cap.rc2.test1.json of CIRR"
    _, content = read_annotations(annotations, ("composed queries of CIRR",), wanted)
    remedy = "split.rc2.val.json of CIRR, of the same split"
    _, split = read_annotations(gallery, ("an image split of CIRR",), remedy)
    places = {name: below(images, file) for name, file in split.items() if FILE.fits(file)}
    queries = []
    found = fitting(annotations, "pairs", content, QUERY)
    for pair in found[:limit]:
        reference, target = pair["reference"], pair.get("target_hard")
        members = [name for name in pair["img_set"]["members"] if name != reference]
        if lacking := [name for name in (reference, *members, *([target] if target else [])) if name not in places]:
            raise UserError(f"{gallery}: lacks image {lacking[0]} of pair {pair['pairid']}; name {remedy}")
        right = (places[target],) if target else ()
        queries.append(
            Composed(str(pair["pairid"]), places[reference], pair["caption"], right, tuple(places[name] for name in members))
        )
    if not queries:
        raise UserError(f"{annotations}: holds no pair; fetch the file again")
    names: dict[Place, str] = {place: name for name, place in places.items()}
    official = len(found) in OFFICIAL and limit is None
    return ComposedSet(annotations.name, queries, list(places.values()), names, official, len(content))


@torch.no_grad()
def evaluate(
    model: Fromage,
    data: ComposedSet,
    options: Options | None = None,
    server_files: Path | None = None,
    overwrite: bool = False,
) -> Report:
    """R@1, 5, 10 and 50 among all images, R@1, 2 and 3 within the set, of FROMAGe, CLIP (image, text, sum) and chance.

    server_files: folder for what CIRR's server takes, {"version": "rc2", "metric": ..., pair: [names]}, a file for each
    metric and prompt; all that a test split gives. Raises UserError as fromage.evals.circo.evaluate does.
    """
    data.check(server_files)
    run = ComposedRun(model, data.name, [data], options)
    (part,) = run.parts
    tasks = part.tasks("all", Scope(part.own), recalls(*RECALL))
    tasks |= part.tasks("subset", Scope(part.own, part.members), recalls(*SUBSET))
    protocol = dict(PROTOCOL)
    if server_files:
        data.check_whole(len(part.queries))
        files: dict[str, Any] = {}
        for at, task in tasks.items():
            metric, k = FILES[at.removesuffix(ASKED)]
            files[f"cirr_{at}.json"] = {"version": "rc2", "metric": metric, **part.answers(run, task, k)}
        protocol["server files"] = write_server_files(server_files, files, overwrite)
    figures = {} if data.is_test else run.evaluate(tasks)
    return run.told_of("cirr", figures, protocol, PAPER, PUBLISHED, list(tasks))
