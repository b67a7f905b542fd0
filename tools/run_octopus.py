"""Octopus on the toy world: the published model, its sequential counterpart, and what each part of it does.

    python tools/run_octopus.py --out runs/octopus_study                        # all, three seeds: a night on two cores
    python tools/run_octopus.py --out runs/octopus_study --only octopus sequential --seeds 0
    python tools/run_octopus.py --out runs/octopus_study --only slow fast --seeds 0 --judged val

octopus is trained as lightning_configs/octopus_toy1.yaml to 3 say, sequential as octopus_sequential.yaml; slow and fast are
sequential with other learning rates, by which its own was chosen. The other rows change one thing of octopus each, in
stages 2 and 3, at the same length; random_queries, blind_queries, no_norm and no_points undo what is ours, not the paper's:
where queries begin, that they see one another, the layer norm before the decoder, and reference points of their own.
Stage 1 is one for all rows of a seed. Figures are of scenes that no training has seen: of a world of another seed, or
(--judged val) of the training world's validation scenes, which designs are chosen on.

What is there is not run again: after a kill, give the command again; to use two cores, give it twice, with other seeds
(once the patches are there). --json writes docs/results/octopus.json's form, with commit and machine.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_kit import commit
from run_ablations import spread

from fromage.apps import octopus_demo as octopus_tour
from fromage.evals import instructions, pope, refcoco
from fromage.io import write_json
from fromage.models.vision.registry import load_patches
from fromage.octopus import Flickr30kSpotting, Instructions, Pope, RefCOCO, load_octopus, model, recognition
from fromage.octopus.patch_store import PatchStore
from fromage.retrieval.encode import Options
from fromage.toy.world import make_world

ROWS: dict[str, list[str]] = {  # of Octopus: what is changed
    "octopus": [],
    "no_relay": ["--model.relay=false"],
    "after1": ["--model.split_layer=1"],
    "after3": ["--model.split_layer=3"],
    "n4": ["--model.num_queries=4"],
    "n16": ["--model.num_queries=16"],
    "n32": ["--model.num_queries=32"],
}
TRIED: dict[str, tuple[Any, str, Callable[..., Any]]] = {  # which function of Octopus is another one, and what it does then
    "random_queries": (model, "_start", lambda lm, n: torch.randn(n, lm.width) * lm.added.mean_norm.cpu() / lm.width**0.5),
    "blind_queries": (model, "among", lambda places, n: torch.zeros(*places.shape, places.shape[1], dtype=torch.bool)),
    "no_norm": (recognition, "_enter", torch.nn.Linear),
    "no_points": (recognition, "_spread", lambda n: torch.zeros(n, 2)),
}
COUNTERPARTS: dict[str, list[str]] = {
    "sequential": [],
    "slow": ["--model.lr=3e-4", "--model.new_lr=6e-4"],
    "fast": ["--model.lr=3e-3", "--model.new_lr=6e-3"],
}
TEST_SEED = 1000  # of the world that all is judged on
SHOWN = {
    "RefCOCO": "refcoco.WHO.val.acc_iou50",
    "RefCOCO+": "refcoco+.WHO.val.acc_iou50",
    "RefCOCOg": "refcocog.WHO.val.acc_iou50",
    "decoder's best": "refcoco.WHO.val.head_recall_top1",
    "among its 5": "refcoco.WHO.val.head_recall_top5",
    "spotting, 2 boxes": "spotting.WHO.2_objects.all_found",
    "3": "spotting.WHO.3_objects.all_found",
    "4": "spotting.WHO.4_objects.all_found",
    "words": "instructions.WHO.text.words",
    "yes or no": "attributes.WHO.val.accuracy",
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
    changed = [*seeded, *(ROWS | COUNTERPARTS).get(name, []), *options]
    if name in COUNTERPARTS:
        return octopus_tour.sequential(folder / name, changed, out, first)
    return octopus_tour.tour(folder / name, changed, out, first=first)


def judge(checkpoint: Path, world: Path, limit: int) -> dict[str, float]:
    """Figures on scenes never trained on: so many expressions, captions with boxes, instructions and yes-or-no questions."""
    octopus, options = load_octopus(str(checkpoint)), Options(batch_size=100)
    instances, images = str(world / "refcoco" / "instances.json"), str(world / "refcoco" / "images")
    reports: dict[str, Any] = {}
    for name, file in (("refcoco", "refs(unc).p"), ("refcoco+", "refs(unc).p"), ("refcocog", "refs(umd).p")):
        refs = RefCOCO(str(world / name / file), instances, images, split="val", limit=limit)
        reports[name] = refcoco.evaluate(octopus, refs, options)
    asked = octopus_tour.SPOTTING
    spotting = Flickr30kSpotting(str(world / "flickr30k_entities"), images, "val", asked, limit)
    reports["spotting"] = instructions.evaluate(octopus, spotting, options)
    told = Instructions(str(world / "llava" / "instruct_val.json"), str(world), limit=limit)
    reports["instructions"] = instructions.evaluate(octopus, told, options)
    reports["attributes"] = pope.evaluate(octopus, Pope(str(world / "attributes" / "val.json"), images, limit), options)
    return {
        f"{name}.{who}.{setting}.{what}": value
        for name, report in reports.items()
        for who in ("octopus", "sequential", "chance")
        for setting, figures in report.get(who, {}).items()
        for what, value in figures.items()
    }


def run(name: str, out: Path, seed: int, judged: str, limit: int, options: list[str]) -> dict[str, float]:
    """Train and judge one row with one seed, unless that is done."""
    done = out / f"seed{seed}" / name / f"{judged}.json"
    if not done.exists():
        print(f"== {name}, seed {seed}", flush=True)
        with patch.object(*TRIED[name]) if name in TRIED else nullcontext():
            checkpoint = train(name, out, seed, options)
            write_json(done, judge(checkpoint, out / ("test_world" if judged == "test" else "world"), limit))
    return json.loads(done.read_text())


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Rows of a Markdown table: mean ± standard deviation over the seeds."""
    rows = [["", *SHOWN], ["---"] * (len(SHOWN) + 1)]
    for name, figures in results.items():
        who = "sequential" if name in COUNTERPARTS else "octopus"
        cells = [figures.get(key.replace("WHO", who)) for key in SHOWN.values()]
        rows.append([name, *(f"{cell['mean']:.1f} ± {cell['deviation']:.1f}" if cell else "" for cell in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
    parser.add_argument("--json", type=Path, help="file for the figures of each seed and their means")
    parser.add_argument("options", nargs="*", help="behind --: further words for `lightning fit`")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prepare(args.out)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    for seed in args.seeds:
        for name in args.only:
            found[name].append(run(name, args.out, seed, args.judged, args.limit, args.options))
    results = {name: spread(runs) for name, runs in found.items()}
    seeds = ", ".join(map(str, args.seeds))
    print(f"\n{table(results)}\n\nin %, of {args.judged} scenes, mean and standard deviation over seeds {seeds}")
    if args.json:
        about = {"commit": commit(), "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"}
        about |= {"torch": torch.__version__, "judged": args.judged, "limit": args.limit, "seeds": args.seeds}
        write_json(args.json, {**about, "runs": found, "figures": results})


if __name__ == "__main__":
    main()
