"""CIRCO: composed retrieval with several right images for a query (Baldrati et al., ICCV 2023).

The 123,403 images of COCO 2017 unlabeled are the gallery; mAP@k is that of the data set's evaluation:

    AP@k = sum of the precisions at the places up to k that right images take / min(k, number of right images)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fromage.data.annotation_formats import read_annotations
from fromage.data.annotations import FILE, TEXT, WHOLE, FieldType, Schema, fitting, optional
from fromage.errors import UserError
from fromage.evals.composed import ASKED, WORDS, Composed, ComposedRun, ComposedSet, write_server_files
from fromage.evals.contextual import PRECISION
from fromage.evals.options import Options
from fromage.evals.report import Report, System
from fromage.models.fromage import Fromage
from fromage.retrieval.metrics import Scope

KEPT = "_reference_kept"
IDS = FieldType("a list of whole numbers", lambda value: isinstance(value, list) and all(map(WHOLE.fits, value)))
QUERY: Schema = {
    "id": WHOLE,
    "reference_img_id": WHOLE,
    "relative_caption": WORDS,
    "shared_concept": optional(TEXT),
    "gt_img_ids": optional(IDS),
}
OFFICIAL = {220, 800}  # queries of val and test
ANSWERED = 50  # images of an answer that the server takes


def _row(*values: float) -> System:
    return {"composed": {f"map{k}": value for k, value in zip((5, 10, 25, 50), values, strict=True)}}


def _asked(*values: float) -> System:
    return {"composed" + ASKED: _row(*values)["composed"]}


PAPER: dict[str, System] = {  # of MCL's table
    "fromage": _asked(4.00, 4.44, 5.26, 5.73),
    "clip": _row(6.37, 7.04, 8.11, 8.72),
    "clip image": _row(2.79, 3.18, 3.75, 4.12),
    "clip text": _row(2.50, 2.64, 3.11, 3.38),
    "MCL OPT-2.7B": _asked(14.55, 15.79, 17.38, 18.27),
    "MCL OPT-6.7B": _asked(15.14, 16.13, 17.88, 18.82),
    "MCL Llama-2-7B": _asked(17.67, 18.86, 20.80, 21.68),
}
PROTOCOL = {
    "mapK": "mAP@K as CIRCO's evaluation has it: the divisor is min(K, right images)",
    "gallery": "all images but the query's own, as MCL's; in composed_reference_kept with it, as CIRCO's authors have it",
}
PUBLISHED = "MCL's table (Li et al., ICML 2024), FROMAGe with OPT-6.7B; shown beside CIRCO's val and test alike"


def read_circo(annotations: Path, gallery: Path, images: Path, limit: int | None = None) -> ComposedSet:
    """The queries of a split, with images/000000123456.jpg and on.

    Args:
        annotations: val.json or test.json of CIRCO.
        gallery: image_info_unlabeled2017.json of COCO, the images that are searched.
        images: folder of the images.
        limit: queries at most; None for all.

    Raises UserError for files that are missing, broken or of another kind, and for queries whose images the gallery lacks.
    """
    _, content = read_annotations(annotations, ("composed queries of CIRCO",), "val.json or test.json of CIRCO")
    remedy = "image_info_unlabeled2017.json of COCO"
    _, listed = read_annotations(gallery, ("captions of COCO", "boxes of COCO", "images of COCO"), remedy)
    entries = fitting(gallery, "images", listed["images"], {"id": WHOLE, "file_name": FILE})
    places = {entry["id"]: images / entry["file_name"] for entry in entries}
    queries = []
    found = fitting(annotations, "queries", content, QUERY)
    for query in found[:limit]:
        reference, right = query["reference_img_id"], query.get("gt_img_ids") or []
        if lacking := [number for number in (reference, *right) if number not in places]:
            raise UserError(f"{gallery}: lacks image {lacking[0]} of query {query['id']}; name {remedy}")
        words = query["relative_caption"]
        queries.append(Composed(str(query["id"]), places[reference], words, tuple(places[i] for i in right)))
    if not queries:
        raise UserError(f"{annotations}: holds no query; fetch the file again")
    names = {place: number for number, place in places.items()}
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
    """mAP@5, 10, 25 and 50 in percent of FROMAGe, CLIP (image, text, sum) and chance.

    server_files: folder for what CIRCO's server takes, {query id: [50 image ids]}, a file for each prompt; all that a test
    split gives. Raises UserError for a test split without it, for files that are there, and for too many images lost.
    """
    data.check(server_files)
    run = ComposedRun(model, data.name, [data], options)
    (part,) = run.parts
    tasks = part.tasks("composed", Scope(part.own), PRECISION)
    kept = {at + KEPT: task for at, task in part.tasks("composed", measure=PRECISION).items() if not at.endswith(ASKED)}
    protocol = dict(PROTOCOL)
    if server_files:
        data.check_whole(len(part.queries))
        files: dict[str, Any] = {f"circo_{at}.json": part.answers(run, task, ANSWERED) for at, task in tasks.items()}
        protocol["server files"] = write_server_files(server_files, files, overwrite)
    figures = {} if data.is_test else run.evaluate(tasks | kept)
    return run.told_of("circo", figures, protocol, PAPER, PUBLISHED, list(tasks))
