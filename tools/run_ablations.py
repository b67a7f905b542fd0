"""The paper's ablations on the toy world: train and judge each configuration with several seeds; mean and spread.

    python tools/run_ablations.py --out runs/ablations                             # all, three seeds: an hour on two cores
    python tools/run_ablations.py --out runs/ablations --only base k4 --seeds 0    # some

A configuration is lightning_configs/toy.yaml and a file of lightning_configs/ablations/ over it; base is toy.yaml alone.
Each run leaves figures.json in its folder, and one that is there is not run again: after a kill, give the command again.
All is measured on scenes of which no training, of the towers or between them, has seen the combination of attributes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from study import Run, collect, measured, table

from fromage.apps.toy_demo import name_things, train
from fromage.data.features import store_features
from fromage.evals import coco, few_shot, visdial, vist
from fromage.evals.caption_sets import read_captions
from fromage.evals.dialogues import read_dialogues
from fromage.io import write_json
from fromage.models.fromage import Fromage, load_model
from fromage.toy.world import make_world
from fromage.training.configs import config_folder

BASE = "base"
SHOWN = {
    "fromage.text_to_image.r1": "captions",
    "captions.right": "named",
    "fromage.1_caption.r1": "last sentence",
    "fromage.5_captions.r1": "five sentences",
    "fromage.5_captions_4_images.r1": "and images",
    "fromage.1_rounds.r1": "1 round",
    "fromage.10_rounds.r1": "10 rounds",
    "fromage.answers.mrr": "answers, MRR",
}


def names() -> list[str]:
    """Every configuration: base, and the files of lightning_configs/ablations."""
    return [BASE, *sorted(path.stem for path in (config_folder() / "ablations").glob("*.yaml"))]


def prepare(out: Path) -> tuple[Path, Path]:
    """The world and the stored features of its training images, made once."""
    world, stored = out / "world", out / "features"
    if not (out / "prepared.json").exists():
        make_world(world)
        store_features(str(world / "cc3m" / "train"), stored, Fromage.load().vision, workers=0)
        write_json(out / "prepared.json", {"world": world.name, "features": stored.name})
    return world, stored


def judge(model: Fromage, world: Path, answers: int) -> dict[str, float]:
    """Every figure of the four evaluations, as 'fromage.5_captions.r1'; answers are ranked for so many dialogues."""
    captions = world / "coco" / "annotations" / "captions_val2017.json"
    stories, talks = world / "vist", world / "visdial"
    noted = talks / "visdial_1.0_val.json", talks / "visdial_1.0_val_dense_annotations.json", talks / "images" / "val"
    reports = [
        coco.evaluate(model, read_captions(captions, world / "coco" / "val2017")),
        vist.evaluate(model, vist.read_stories(stories / "sis" / "val.story-in-sequence.json", stories / "images" / "val")),
        visdial.evaluate(model, read_dialogues(*noted, answers), answers=True),
        visdial.evaluate(model, read_dialogues(*noted), answers=False),  # of all dialogues, over those of a few
        few_shot.evaluate(model, few_shot.read_world(world, limit=100)),
    ]
    figures = {"captions.right": name_things(model, world)}
    for report in reports:
        for who in ("fromage", "clip", "chance"):
            for setting, found in report.get(who, {}).items():
                figures |= {f"{who}.{setting}.{name}": value for name, value in found.items()}
    return figures


def run(name: str, seed: int, out: Path, prepared: tuple[Path, Path], answers: int, options: list[str]) -> Run:
    """Train and judge one configuration with one seed, unless that is done."""
    folder = out / name / f"seed{seed}"

    def measure() -> dict[str, float]:
        print(f"\n== {name}, seed {seed}", flush=True)
        words = [] if name == BASE else ["--config", f"ablations/{name}.yaml"]
        words += [f"--seed_everything={seed}", f"--model.seed={seed}", *options]
        return judge(load_model(train(folder, 1, *prepared, words)), prepared[0], answers)

    return measured(folder / "figures.json", measure)


def main() -> None:
    """Read the command line; run, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the world and the runs")
    parser.add_argument("--only", nargs="+", choices=names(), default=names(), metavar="NAME", help=", ".join(names()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--answers", type=int, default=60, help="dialogues whose answers are ranked")
    parser.add_argument("--json", type=Path, help="file for the figures of each seed; runs that it holds stay")
    parser.add_argument("options", nargs="*", help="behind --: further words for `lightning fit`")
    args = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    prepared = prepare(args.out)
    runs = {
        name: {str(seed): run(name, seed, args.out, prepared, args.answers, args.options) for seed in args.seeds}
        for name in args.only
    }
    print(f"\n{table(SHOWN, collect(args.json, runs, answers=args.answers))}\n\nR@1 in %, mean and standard deviation")


if __name__ == "__main__":
    main()
