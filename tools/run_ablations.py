"""Ablations on the toy world: train and judge each configuration with several seeds; mean and spread.

    python tools/run_ablations.py --out runs/ablations                             # all, three seeds: an hour on two cores
    python tools/run_ablations.py --out runs/ablations --only base k4 --seeds 0    # some
    python tools/run_ablations.py --out runs/ablations --only composition          # MCL's table 5 in miniature

A configuration is lightning_configs/toy.yaml and a file of lightning_configs/ablations/ over it; base is toy.yaml alone.
Each run leaves figures.json in its folder, and one that is there is not run again: after a kill, give the command again.
All that is to be found are scenes of which no training, of the towers or between them, has seen the combination of
attributes. The images before a story's last are scenes of training.

composition stands for base and the files composition_*.yaml, which train on tuples too (fromage.toy.tuples). The column
of composed queries is theirs: an image and a condition among the images of all tuples of unseen scenes, references and
targets, without the query's own reference, as in CIRR. Each reference has four tuples, so it alone does not tell the target.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from study import Run, begin, configs, every, measured, table, trained

from fromage.apps.tours import CHECKPOINT, finished, once
from fromage.apps.toy_demo import name_things, train
from fromage.data.features import store_features
from fromage.data.tuple_packing import pack_tuples
from fromage.evals import coco, few_shot, visdial, vist
from fromage.evals.caption_sets import read_caption_set
from fromage.evals.composed import Composed, ComposedRun, ComposedSet
from fromage.evals.dialogues import read_dialogues
from fromage.io import write_json
from fromage.models.fromage import Fromage, load_model
from fromage.retrieval.metrics import Scope
from fromage.toy.tuples import LINES, make_tuples
from fromage.toy.world import make_world
from fromage.training.configs import config_folder

BASE, COMPOSITION = "base", "composition"
SEEN, UNSEEN, CHANGES = 8192, 1000, 4  # tuples to train on, and to judge by; of each reference image
BUFFER = 256  # tuples that are shuffled: small, so that a batch holds several of one reference
SHOWN = {
    "fromage.text_to_image.r1": "captions",
    "captions.right": "named",
    "fromage.1_caption.r1": "last sentence",
    "fromage.5_captions.r1": "five sentences",
    "fromage.5_captions_4_images.r1": "and images",
    "fromage.1_rounds.r1": "1 round",
    "fromage.10_rounds.r1": "10 rounds",
    "fromage.answers.mrr": "answers, MRR",
    "fromage.composed.r1": "composed",
}


def names() -> list[str]:
    """The paper's ablations: base, and the files of lightning_configs/ablations that are not of composition."""
    files = sorted(path.stem for path in (config_folder() / "ablations").glob("*.yaml"))
    return [BASE, *(name for name in files if not name.startswith(COMPOSITION))]


def compositions() -> list[str]:
    """The configurations of composition learning: base, the plain one, and the files composition_*.yaml."""
    return [BASE, *sorted(path.stem for path in (config_folder() / "ablations").glob(f"{COMPOSITION}_*.yaml"))]


def prepare(out: Path) -> tuple[Path, Path]:
    """The world and the stored features of its training images, made once; and the tuples, in out/tuples."""
    world, stored = out / "world", out / "features"
    tuples = out / "tuples"
    if not (out / "prepared.json").exists():
        make_world(world)
        store_features(str(world / "cc3m" / "train"), stored, Fromage.load().vision, workers=0)
        write_json(out / "prepared.json", {"world": world.name, "features": stored.name})
    if not (tuples / "prepared.json").exists():
        for split, count in (("train", SEEN), ("val", UNSEEN)):
            make_tuples(tuples / split, count, split, CHANGES)
        pack_tuples(tuples / "train" / LINES, tuples / "shards", overwrite=True)
        store_features(str(tuples / "shards"), tuples / "features", Fromage.load().vision, workers=0)
        write_json(tuples / "prepared.json", {"train": SEEN, "val": UNSEEN})
    return world, stored


@torch.no_grad()
def find_composed(model: Fromage, folder: Path) -> dict[str, Any]:
    """Composed retrieval over a folder of tuples, by FROMAGe and by CLIP: both of its embeddings, or one of them."""
    entries = [json.loads(line) for line in (folder / LINES).read_text("utf-8").splitlines()]
    queries = [
        Composed(str(i), folder / entry["image"], entry["condition"], (folder / entry["target_image"],))
        for i, entry in enumerate(entries)
    ]
    gallery = [query.reference for query in queries] + [query.right[0] for query in queries]
    run = ComposedRun(model, folder.name, [ComposedSet(folder.name, queries, gallery)], None)
    (part,) = run.parts
    found = run.evaluate({"composed": part.tasks("composed", Scope(part.own))["composed"]})
    return {who.replace(" ", "_"): figures for who, figures in found.items()}


def judge(model: Fromage, world: Path, answers: int) -> dict[str, float]:
    """Every figure of the five evaluations, as 'fromage.5_captions.r1'; answers are ranked for so many dialogues."""
    captions = world / "coco" / "annotations" / "captions_val2017.json"
    stories, talks = world / "vist", world / "visdial"
    noted = talks / "visdial_1.0_val.json", talks / "visdial_1.0_val_dense_annotations.json", talks / "images" / "val"
    reports = [
        coco.evaluate(model, read_caption_set(captions, world / "coco" / "val2017")),
        vist.evaluate(model, vist.read_stories(stories / "sis" / "val.story-in-sequence.json", stories / "images" / "val")),
        visdial.evaluate(model, read_dialogues(*noted, answers), answers=True),
        visdial.evaluate(model, read_dialogues(*noted), answers=False),  # of all dialogues, over those of a few
        few_shot.evaluate(model, few_shot.read_world(world, limit=100)),
        find_composed(model, world.parent / "tuples" / "val"),
    ]
    figures = {"captions.right": name_things(model, world)}
    for report in reports:
        for who in ("fromage", "clip", "clip_image", "clip_text", "chance"):
            for setting, found in report.get(who, {}).items():
                figures |= {f"{who}.{setting}.{name}": value for name, value in found.items()}
    return figures


def run(name: str, seed: int, out: Path, prepared: tuple[Path, Path], answers: int, options: list[str]) -> Run:
    """Train and judge one configuration with one seed, unless that is done. All figures stay in the folder of the run."""
    folder = out / name / f"seed{seed}"
    path, last = folder / "figures.json", folder / CHECKPOINT
    words = [] if name == BASE else ["--config", f"ablations/{name}.yaml"]
    world = json.loads((prepared[0] / "world.json").read_text("utf-8"))["version"]
    of = {"options": options, "configs": configs("toy.yaml", *words[1:]), "world": world}
    if name.startswith(COMPOSITION):
        words += [f"--data.train_tuples={out / 'tuples' / 'features'}", f"--data.tuple_shuffle={BUFFER}"]
    words += [f"--seed_everything={seed}", f"--model.seed={seed}", *options]
    ended = finished(folder) is not None or (path.exists() and last.exists())

    def fit() -> Path:
        print(f"\n== {name}, seed {seed}", flush=True)
        return once(folder, options, lambda again: train(folder, 1, *prepared, [*words, *again]))

    checkpoint, origin = trained(folder, (lambda: last) if ended else fit, ended, [path], **of)
    judged = lambda: judge(load_model(checkpoint), prepared[0], answers)  # noqa: E731
    made = origin | measured(path, judged, origin["checkpoint"], answers=answers, **of)
    kept = {name: value for name, value in made["figures"].items() if name in SHOWN or ".composed." in name}
    return made | {"figures": kept}


def main() -> None:
    """Read the command line; run, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the world and the runs")
    known = [*names(), *compositions()[1:], COMPOSITION]
    parser.add_argument("--only", nargs="+", choices=known, default=names(), metavar="NAME", help=", ".join(known))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--answers", type=int, default=60, help="dialogues whose answers are ranked")
    parser.add_argument("--json", type=Path, help="file for the figures of each seed; runs that it holds stay")
    parser.add_argument("options", nargs="*", help="after --: further words for `lightning fit`")
    args = parser.parse_args()
    begin(min(2, torch.get_num_threads()))
    prepared = prepare(args.out)
    asked = [name for word in args.only for name in (compositions() if word == COMPOSITION else [word])]
    one = lambda name, seed: run(name, seed, args.out, prepared, args.answers, args.options)  # noqa: E731
    runs = every(asked, args.seeds, one, args.json, answers=args.answers)
    print(f"\n{table(SHOWN, runs)}\n\nR@1 in %, mean and standard deviation")


if __name__ == "__main__":
    main()
