"""GeneCIS: four tasks of conditional similarity, each query with a small gallery (Vaze et al., CVPR 2023).

focus_attribute and change_attribute show objects of Visual Genome, cut out; focus_object and change_object show images of
COCO val2017. R@1, 2 and 3 among the target and the 9 or 14 other images of its gallery, and the mean of the tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fromage.data.annotation_formats import read_annotations
from fromage.data.annotations import NUMBER, WHOLE, Schema, fitting
from fromage.errors import UserError
from fromage.evals.composed import ASKED, WORDS, Composed, ComposedRun, ComposedSet, with_mean
from fromage.evals.contextual import RetrievalTask, recalls
from fromage.evals.options import Options
from fromage.evals.report import Report, System
from fromage.images.regions import Place, Region
from fromage.models.fromage import Fromage
from fromage.retrieval.metrics import Scope

OBJECT: Schema = {"val_image_id": WHOLE}
ATTRIBUTE: Schema = {"image_id": WHOLE, "instance_bbox": (NUMBER,) * 4}
TASKS = {"focus_attribute": ATTRIBUTE, "change_attribute": ATTRIBUTE, "focus_object": OBJECT, "change_object": OBJECT}
FOLDERS = {"val_image_id": ("val2017",), "image_id": ("VG_100K", "VG_100K_2")}
DILATED = 0.7  # of the box's side, by which a region is larger than the object
OBJECTS = 1960  # queries of each of the two published files about objects
RECALL = (1, 2, 3)


def _mean(value: float, ending: str = "") -> System:
    return {f"mean{ending}": {"r1": value}}


PAPER: dict[str, System] = {  # of MCL's table: the mean alone
    "fromage": _mean(14.3, ASKED),
    "clip": _mean(12.6),
    "clip image": _mean(11.0),
    "clip text": _mean(9.1),
    "MCL OPT-2.7B": _mean(15.8, ASKED),
    "MCL OPT-6.7B": _mean(16.1, ASKED),
    "MCL Llama-2-7B": _mean(16.3, ASKED),
}
PROTOCOL = {
    "gallery": "the target and the images listed with it",
    "attributes": "regions of Visual Genome, 0.7 of the box's side larger, on a black square",
    "mean": "over the tasks",
}
PUBLISHED = "MCL's table (Li et al., ICML 2024), FROMAGe with OPT-6.7B; stands beside the four published files"


def read_genecis(files: Sequence[Path], images: Path, limit: int | None = None) -> list[ComposedSet]:
    """A set for each file.

    Args:
        files: focus_attribute.json, change_attribute.json, focus_object.json and change_object.json, or some of them.
        images: the folder that holds val2017, VG_100K and VG_100K_2, or the images themselves.
        limit: queries of each task at most; None for all.

    Raises UserError for files that are missing, broken or of another name, and for two of one name.
    """
    names = [file.stem for file in files]
    if unknown := [file for file in files if file.stem not in TASKS]:
        raise UserError(
            f"{unknown[0]}: is no task of GeneCIS by its name; there are {', '.join(f'{n}.json' for n in TASKS)}"
        )
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{min(twice)}: two files of this name; give each task once")
    sets = [_read_task(file, TASKS[file.stem], images, limit) for file in files]
    sizes = {some.name: len(some.queries) for some in sets}
    whole = set(sizes) == set(TASKS) and sizes["focus_object"] == sizes["change_object"] == OBJECTS
    return [ComposedSet(some.name, some.queries, some.gallery, published=whole and limit is None) for some in sets]


def _read_task(file: Path, wanted: Schema, images: Path, limit: int | None) -> ComposedSet:
    _, content = read_annotations(file, ("templates of GeneCIS",), f"{file.name} of GeneCIS")
    template: Schema = {"condition": WORDS, "reference": wanted, "target": wanted, "gallery": [wanted]}
    queries = []
    for number, entry in enumerate(fitting(file, "templates", content, template)[:limit]):
        reference, target = (_place(images, entry[name]) for name in ("reference", "target"))
        members = (target, *(_place(images, image) for image in entry["gallery"]))
        queries.append(Composed(str(number), reference, entry["condition"], (target,), members))
    if not queries:
        raise UserError(f"{file}: holds no template; fetch the file again")
    return ComposedSet(file.stem, queries, [place for query in queries for place in query.members])


def _place(images: Path, image: dict[str, Any]) -> Place:
    """An image of COCO, or the region of Visual Genome around an object."""
    kind = next(name for name in FOLDERS if name in image)
    name = f"{image[kind]:012d}.jpg" if kind == "val_image_id" else f"{image[kind]}.jpg"
    paths = [images / name, *(images / folder / name for folder in FOLDERS[kind])]
    path = next((path for path in paths if path.is_file()), paths[0])
    return Region(path, dilated(*image["instance_bbox"])) if kind == "image_id" else path


def dilated(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    """The region (left, top, right, bottom) of an object's box, as GeneCIS cuts it.

    It begins 0.7 of a side before the box, or at the image's edge, and is 1.7 sides long.
    """
    left, top = max(0.0, x - DILATED * width), max(0.0, y - DILATED * height)
    return left, top, left + (1 + DILATED) * width, top + (1 + DILATED) * height


@torch.no_grad()
def evaluate(model: Fromage, data: list[ComposedSet], options: Options | None = None) -> Report:
    """R@1, 2 and 3 of each task and their mean, of FROMAGe, CLIP (image, text, sum) and chance, in percent.

    Raises UserError for too many images lost.
    """
    run = ComposedRun(model, ", ".join(some.name for some in data), data, options)
    tasks: dict[str, RetrievalTask] = {}
    for part in run.parts:
        tasks |= part.tasks(part.data.name, Scope(among=part.members), recalls(*RECALL))
    figures = with_mean(run.evaluate(tasks), [some.name for some in data])
    return run.told_of("genecis", figures, PROTOCOL, PAPER, PUBLISHED, list(figures["fromage"]))
