"""Octopus on the toy world: the published model, its sequential counterpart, and what each part of it does.

    python tools/run_octopus.py --out runs/octopus_study                        # 9 rows of three seeds, days of a core
    python tools/run_octopus.py --out runs/octopus_study --only octopus sequential --seeds 0
    python tools/run_octopus.py --out runs/octopus_study --only slow fast --seeds 0 --judged val

octopus is trained as lightning_configs/octopus_toy1.yaml to 3 say, sequential as octopus_sequential.yaml; slow and fast are
sequential with other learning rates, to search its own by. The other rows change one thing of octopus each, in
stages 2 and 3, at the same length; four of them undo what is ours, not the paper's: how far apart queries begin
(far_queries) and where (random_queries), that they see one another (blind_queries), and that their reference points begin
spread over the image (no_points: all in its middle). Stage 1 is one for all rows of a seed. Figures are of scenes that no
training has seen: of a world of another seed, or (--judged val) of the training world's validation scenes, which designs are
chosen on.

What is there is not run again: after a kill, give the command again; to use two cores, give it twice, with other seeds
(once the patches are there). Figures of the usual setting are added to docs/results/octopus.json, with each run's commit and
machine, or to the file --json. A row takes one to two hours of a core per seed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from study import Run, begin, configs, every, measured, table, trained

from fromage.apps import octopus_demo as octopus_tour
from fromage.evals import instructions, pope, refcoco
from fromage.evals.options import Options
from fromage.evals.predict import predict
from fromage.evals.report import Figures
from fromage.models.vision.registry import load_patches
from fromage.octopus import Flickr30kSpotting, Instructions, Pope, RefCOCO, load_octopus, model, queries, recognition
from fromage.octopus.examples import Box
from fromage.octopus.metrics import all_found
from fromage.octopus.model import Octopus
from fromage.octopus.patch_store import PatchStore
from fromage.toy.expressions import describes
from fromage.toy.scenes import PLACES, Scene, Thing
from fromage.toy.world import VERSION, make_world

ROWS: dict[str, list[str]] = {  # of Octopus: what is changed
    "octopus": [],
    "no_relay": ["--model.relay=false"],
    "after1": ["--model.split_layer=1"],
    "after3": ["--model.split_layer=3"],
    "n4": ["--model.num_queries=4"],
    "n16": ["--model.num_queries=16"],
    "n32": ["--model.num_queries=32"],
    "masks": ["--model.mask_scale=4"],
}
TRIED: dict[str, tuple[Any, str, Any]] = {  # what of Octopus is another one, and what it is then
    "far_queries": (queries, "NOISE", 1.0),
    "random_queries": (
        model,
        "initial_queries",
        lambda lm, n: torch.randn(n, lm.width) * lm.added.mean_norm.cpu() / lm.width**0.5,
    ),
    "blind_queries": (model, "among", lambda back, queries, layout: back),
    "no_points": (recognition, "initial_reference_points", lambda n: torch.zeros(n, 2)),
}
COUNTERPARTS: dict[str, list[str]] = {
    "sequential": [],
    "slow": ["--model.lr=3e-4", "--model.new_lr=6e-4"],
    "fast": ["--model.lr=3e-3", "--model.new_lr=6e-3"],
}
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "octopus.json"
TRACKED = {"judged": "test", "limit": 2000}  # the setting of its figures
TEST_SEED = 1000  # of the world that all is judged on
SHOWN = {
    "refcoco.val.acc_iou50": "RefCOCO",
    "refcoco+.val.acc_iou50": "RefCOCO+",
    "refcocog.val.acc_iou50": "RefCOCOg",
    "refcoco.val.head_recall_top1": "decoder's best",
    "refcoco+.val.head_recall_top1": "of RefCOCO+",
    "refcoco.val.head_recall_top5": "among its 5",
    "spotting.2_objects.all_found": "spotting, 2 boxes",
    "spotting.3_objects.all_found": "3",
    "spotting.4_objects.all_found": "4",
    "instructions.text.words": "words",
    "attributes.val.accuracy": "yes or no",
}
SETS = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocog": "RefCOCOg"}
FURTHER = {
    "the right object among the decoder's best boxes (the paper's table 5)": {
        f"{name}.val.head_recall_top{k}": f"{told}, {k}" for name, told in SETS.items() for k in range(1, 6)
    },
    "a random object is right": {f"chance.{name}.val.acc_iou50": told for name, told in SETS.items()},
    "questions about attributes": {f"attributes.val/{kind}.accuracy": kind for kind in ("colour", "shape", "size", "place")},
    "POPE: questions about objects, accuracy of the three splits, and their mean F1": {
        **{f"pope.{name}.accuracy": name.removeprefix("coco_pope_") for name in pope.OFFICIAL},
        "pope.mean.f1": "mean F1",
    },
    "captions that point at every object and at no other, by phrases that describe what they point at": {
        f"spotting.{n}_objects.described": f"{n} boxes" for n in (2, 3, 4)
    },
    "captions whose boxes come in the order of the data, which is a random one": {
        f"spotting.{n}_objects.in_order": f"{n} boxes" for n in (2, 3, 4)
    },
    "masks, cIoU (the paper's table 6), and that of the box filled": {
        "refcoco.val.mask_ciou": "RefCOCO",
        "refcoco.val.box_ciou": "box",
    },
}


def prepare(out: Path) -> None:
    """The world of all runs, that of their test, and the patches of their images."""
    octopus_tour.make(out)
    make_world(out / "test_world", seed=TEST_SEED, **octopus_tour.COUNTS)
    folders = [out / "world" / part for part in ("refcoco/images", "coco", "visual_genome")]
    images = [path for folder in (*folders, out / "test_world" / "refcoco" / "images") for path in folder.rglob("*.jpg")]
    PatchStore(out / "patches", load_patches("toy")).add(sorted(map(str, images)))


def train(name: str, out: Path, seed: int, options: list[str]) -> Path:
    """Train one row, unless it is there; returns its checkpoint."""
    folder, seeded = out / f"seed{seed}", [f"--{what}={seed}" for what in ("seed_everything", "model.seed", "data.seed")]
    first = octopus_tour.tour(folder, [*seeded, *options], out, stages=1)
    changed = [*seeded, *([] if name in TRIED else words_of(name)), *options]
    if name in COUNTERPARTS:
        return octopus_tour.sequential(folder / name, changed, out, first)
    return octopus_tour.tour(folder / name, changed, out, first=first)


def judge(checkpoint: Path, world: Path, limit: int) -> dict[str, float]:
    """Figures on scenes never trained on: so many expressions, captions with boxes, instructions and questions."""
    octopus, options = load_octopus(str(checkpoint)), Options(batch_size=100)
    instances, images = str(world / "refcoco" / "instances.json"), str(world / "refcoco" / "images")
    reports: dict[str, Any] = {}
    for name, file in (("refcoco", "refs(unc).p"), ("refcoco+", "refs(unc).p"), ("refcocog", "refs(umd).p")):
        refs = RefCOCO(str(world / name / file), instances, images, split="val", limit=limit)
        reports[name] = refcoco.evaluate(octopus, refs, options)
    asked = octopus_tour.SPOTTING
    spotting = Flickr30kSpotting(str(world / "flickr30k_entities"), images, split="val", instruction=asked, limit=limit)
    reports["spotting"] = instructions.evaluate(octopus, spotting, options)
    told = Instructions(str(world / "llava" / "instruct_val.json"), str(world), limit=limit)
    reports["instructions"] = instructions.evaluate(octopus, told, options)
    questions = Pope(str(world / "attributes" / "val.json"), images, limit=limit)
    reports["attributes"] = pope.evaluate(octopus, questions, options)
    splits = [Pope(str(world / "pope" / f"{name}.json"), images, limit=limit) for name in pope.OFFICIAL]
    reports["pope"] = pope.evaluate(octopus, splits, options)
    return described(octopus, spotting, world, options) | {
        f"{prefix}{name}.{setting}.{what}": value
        for name, report in reports.items()
        for who, prefix in (("octopus", ""), ("sequential", ""), ("chance", "chance."))
        for setting, figures in report.get(who, {}).items()
        for what, value in figures.items()
    }


def described(octopus: Octopus, spotting: Flickr30kSpotting, world: Path, options: Options) -> Figures:
    """Share of captions, in %, that find every object by a phrase which describes it, by the number of objects."""
    listed = json.loads((world / "refcoco" / "instances.json").read_text())["images"]
    scenes = {image["file_name"]: Scene.parse(image["scene"]) for image in listed}
    right: dict[str, list[bool]] = defaultdict(list)
    for example, answer in predict(octopus, [spotting], options).pairs[0]:
        fits, phrase = all_found(answer.boxes, example.target_boxes), ""
        for piece in answer.pieces:
            if isinstance(piece, str):
                phrase = piece  # several boxes may follow it
            else:
                fits &= describes(phrase, nearest(scenes[Path(example.image).name], piece))
        right[f"spotting.{instructions.setting(example)}.described"].append(fits)
    return {name: 100 * sum(fits) / len(fits) for name, fits in right.items()}


def nearest(scene: Scene, box: Box) -> Thing:
    """The object whose place is nearest to the middle of a box."""
    middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return min(scene.things, key=lambda thing: math.dist(PLACES[thing.place], middle))


def words_of(name: str) -> list[str]:
    """What a row changes: words for `lightning fit`, or the source of what stands in for a part of Octopus."""
    if name not in TRIED:
        return (ROWS | COUNTERPARTS)[name]
    module, what, other = TRIED[name]
    return [f"{module.__name__}.{what}: {inspect.getsource(other).strip() if callable(other) else other}"]


def run(name: str, out: Path, seed: int, judged: str, limit: int, options: list[str]) -> Run:
    """Train and judge one row with one seed, unless that is done."""
    folder, counterpart = out / f"seed{seed}" / name, name in COUNTERPARTS
    path = folder / f"{judged}.json"
    print(f"== {name}, seed {seed}", flush=True)
    of = {
        "words": words_of(name),
        "options": options,
        "world": VERSION,
        "configs": configs(*octopus_tour.STAGES, *octopus_tour.SEQUENTIAL[1:] * counterpart),
    }
    ended = octopus_tour.trained(folder, "sequential" if counterpart else "stage3") is not None
    with patch.object(*TRIED[name]) if name in TRIED else nullcontext():
        checkpoint, origin = trained(folder, lambda: train(name, out, seed, options), ended, [path], **of)
        world = out / ("test_world" if judged == "test" else "world")
        return origin | measured(path, lambda: judge(checkpoint, world, limit), origin["checkpoint"], limit=limit, **of)


def main() -> None:
    """Read the command line, run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the worlds and the runs")
    known = [*ROWS, *TRIED, *COUNTERPARTS]
    usual = [*ROWS, "sequential"]
    parser.add_argument("--only", nargs="+", choices=known, default=usual, metavar="NAME", help=", ".join(known))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--judged", choices=("test", "val"), default="test", help="scenes that figures are of")
    parser.add_argument("--limit", type=int, default=2000, help="examples of each kind that are judged")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--json", type=Path, help="file for the figures of each seed; runs that it holds stay (default: see above)"
    )
    parser.add_argument("options", nargs="*", help="after --: further words for `lightning fit`")
    args = parser.parse_args()
    begin(args.threads)
    prepare(args.out)
    setting = {"judged": args.judged, "limit": args.limit}
    path = args.json or (RESULTS if setting == TRACKED and not args.options else None)
    runs = every(
        args.only,
        args.seeds,
        lambda name, seed: run(name, args.out, seed, args.judged, args.limit, args.options),
        path,
        **setting,
    )
    print(f"\n{table(SHOWN, runs)}\n\nin %, of {args.judged} scenes, mean and standard deviation over seeds")
    for heading, shown in FURTHER.items():
        print(f"\n{heading}\n\n{table(shown, runs)}")


if __name__ == "__main__":
    main()
