"""Octopus on the toy world with several seeds, its sequential counterpart, and ablations: train all, judge all, tables.

    python tools/run_octopus.py --out runs/octopus_study                         # all, three seeds: two hours on two cores
    python tools/run_octopus.py --out runs/octopus_study --only octopus sequential --seeds 0

octopus and sequential are trained as lightning_configs/octopus_toy*.yaml say. The ablations change one thing each of a
shorter run, `base`: stage 3 right after stage 1, on referring expressions alone. What is there is not run again: after a
kill, give the command again; to use two cores, give it twice, with other seeds (once the patches are there).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from run_ablations import spread

from fromage.apps import octopus_demo as octopus_tour
from fromage.evals import instructions, pope, refcoco
from fromage.io import write_json
from fromage.models.vision.registry import load_patches
from fromage.octopus import Instructions, Pope, RefCOCO, load_octopus
from fromage.octopus.patch_store import PatchStore
from fromage.retrieval.encode import Options

SHORT = ["--model.stage=3", "--model.lr=1e-3", "--trainer.max_steps=400", "--trainer.val_check_interval=400"]
ABLATIONS = {
    "base": [],
    "n4": ["--model.num_queries=4"],
    "n16": ["--model.num_queries=16"],
    "bottom": ["--model.split_layer=1"],
    "top": ["--model.split_layer=3"],
    "no_relay": ["--model.relay=false"],
}
MAIN = ("octopus", "sequential")
SHOWN = {
    "refcoco.WHO.val.acc_iou50": "IoU > 0.5",
    "refcoco.WHO.val.mean_iou": "mean IoU",
    "refcoco.WHO.val.head_recall_top1": "head's best, IoU > 0.5",
    "refcoco.WHO.val.head_recall_top5": "among head's 5",
    "instructions.WHO.2_objects.all_found": "two objects, both found",
    "instructions.WHO.3_objects.all_found": "three, all found",
    "instructions.WHO.text.words": "answers in words",
    "pope.WHO.val.accuracy": "yes or no",
}


def prepare(out: Path) -> None:
    """The world of all runs, and the patches of its images."""
    octopus_tour.make(out)
    images = [str(path) for part in ("refcoco/images", "coco") for path in sorted((out / "world" / part).rglob("*.jpg"))]
    PatchStore(out / "patches", load_patches("toy")).add(images)


def train(name: str, out: Path, seed: int, options: list[str]) -> Path:
    """Train one configuration, unless it is there; returns its checkpoint."""
    folder, seeded = out / f"seed{seed}", [f"--{what}={seed}" for what in ("seed_everything", "model.seed", "data.seed")]
    if name == "octopus":
        return octopus_tour.tour(folder, [*seeded, *options], out)
    if name == "sequential":
        return octopus_tour.sequential(folder, [*seeded, *options], out)
    words = [
        f"--model.init={octopus_tour.tour(folder, [*seeded, *options], out, stages=1)}",
        f"--trainer.callbacks.init_args.dirpath={folder / name / 'checkpoints'}",
        f"--trainer.logger.init_args.name={name}",
    ]
    return octopus_tour.train_once(
        folder, name, octopus_tour.STAGES[1:2], [*seeded, *SHORT, *words, *ABLATIONS[name], *options], out
    )


def judge(checkpoint: Path, world: Path, limit: int) -> dict[str, float]:
    """Figures on scenes never trained on: referring expressions, instructions and yes-or-no questions, so many of each."""
    model, options = load_octopus(str(checkpoint)), Options(batch_size=100)
    files = world / "refcoco" / "refs(unc).p", world / "refcoco" / "instances.json", world / "refcoco" / "images"
    reports = {
        "refcoco": refcoco.evaluate(model, RefCOCO(*map(str, files), split="val", limit=limit), options),
        "instructions": instructions.evaluate(
            model, Instructions(str(world / "llava" / "instruct_val.json"), str(world), limit=limit), options
        ),
        "pope": pope.evaluate(model, Pope(str(world / "attributes" / "val.json"), str(files[2]), limit), options),
    }
    return {
        f"{name}.{who}.{setting}.{what}": value
        for name, report in reports.items()
        for who in ("octopus", "sequential", "chance")
        for setting, figures in report.get(who, {}).items()
        for what, value in figures.items()
    }


def run(name: str, out: Path, seed: int, limit: int, options: list[str]) -> dict[str, float]:
    """Train and judge one configuration with one seed, unless that is done."""
    done = out / f"seed{seed}" / name / "figures.json"
    if not done.exists():
        print(f"== {name}, seed {seed}", flush=True)
        checkpoint = train(name, out, seed, options)
        done.parent.mkdir(exist_ok=True)
        write_json(done, judge(checkpoint, out / "world", limit))
    return json.loads(done.read_text())


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Rows of a Markdown table: mean ± standard deviation over the seeds."""
    rows = [["", *SHOWN.values()], ["---"] * (len(SHOWN) + 1)]
    for name, figures in results.items():
        who = "sequential" if name == "sequential" else "octopus"
        cells = [figures.get(key.replace("WHO", who)) for key in SHOWN]
        rows.append([name, *(f"{cell['mean']:.1f} ± {cell['deviation']:.1f}" if cell else "" for cell in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Read the command line, run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the world and the runs")
    known = [*MAIN, *ABLATIONS]
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=2000, help="examples of each kind that are judged")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("options", nargs="*", help="behind --: further words for `lightning fit`")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prepare(args.out)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    for seed in args.seeds:
        for name in args.only:
            found[name].append(run(name, args.out, seed, args.limit, args.options))
    results = {name: spread(runs) for name, runs in found.items()}
    print(f"\n{table(results)}\n\nin %, mean and standard deviation over seeds {', '.join(map(str, args.seeds))}")
    if args.json:
        write_json(args.json, {"seeds": args.seeds, "figures": results})


if __name__ == "__main__":
    main()
