"""FROMAGe on real photographs with a pretrained pair of towers: every figure of docs/tutorials/photos.md.

    python tools/run_photos.py --train captions_train.json --judged captions_val.json --images photos --out runs/photo_study
    python tools/run_photos.py ... --only base k4 --seeds 0          # some rows
    python tools/run_photos.py ... --choose --only base              # judged on photographs held out of the training ones

Both files are captions in COCO's format, images the folder of the photographs. base is lightning_configs/photos.yaml; each
other row changes one thing of it. Most train one of the two passes alone, which share one row, that of [RET] in the output
head: those of captions as many captions as base, 32 a step. --coco FOLDER holds val2017/, captions_val2017_sample.json and
instances_val2017_sample.json: photographs of another kind, and what questions are asked of. What is there is not run again:
after a kill, give the command again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from photo_figures import (
    SENTENCES,
    SHOTS,
    Figures,
    Ridge,
    answers,
    ask,
    asking,
    captions,
    chance,
    few_shot,
    growing,
    read,
    recalls,
)
from study import Run, Runs, begin, collect, configs, every, measured, table, trained
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fromage.apps.photos import CONFIG, source_of, train
from fromage.apps.tours import draw_searches, finished
from fromage.data.features import store_features
from fromage.data.packing import is_packed, pack_coco
from fromage.identity import FolderKind
from fromage.models.fromage import Fromage, load_model
from fromage.models.towers import folder_of, get
from fromage.models.vision.registry import load_vision
from fromage.retrieval.build import build_index

ALONE, CAPTIONING = ["--model.captioning_weight=0"], ["--model.retrieval_weight=0"]
BARE, BLIND = "retrieval alone", "untrained language model"
ROWS: dict[str, list[str]] = {
    "base": [],
    **{
        f"captions k{k}": [*CAPTIONING, "--model.captioned_share=1", "--data.batch_size=32", f"--model.k={k}"]
        for k in (1, 2, 4, 8)
    },
    "requests": ["--data.requests=0.2"],
    BARE: ALONE,
    "last token": [*ALONE, "--model.pooling=last", "--model.r=1"],
    BLIND: ALONE,
    "no dropout": [*ALONE, "--model.image_dropout=0"],
    "free norm": [*ALONE, "--model.rescale_ret=false"],
    "one [RET]": [*ALONE, "--model.r=1"],
    "q 64": [*ALONE, "--model.q=64"],
    "q 1024": [*ALONE, "--model.q=1024"],
}
SOME = {"1000 photographs": 1, "2000 photographs": 2, "4000 photographs": 4}  # shards of 1,000 that are trained on
LM, VISION = "smollm2", "efficientnet-lite2"
EXAMPLES = (0, 2, 4)  # photographs with their questions and answers that stand before a question
STYLES = ("alone", "dialogue", "template")  # in which an image is asked for
COCO_CAPTIONS = "captions_val2017_sample.json"
OF_JUDGED = {"photographs", "captions", "growing", "few shot"}  # what is measured on the photographs that judge
SOURCE = FolderKind("source.json", "photographs", of="source", remedy="name another folder: --out")
RIDGE = (0.001, 0.01, 0.1)  # weights of the linear baseline, the best of which is taken on photographs held out
SHOWN = {
    "photographs.t2i_r1": "R@1",
    "photographs.t2i_r5": "R@5",
    "photographs.t2i_r10": "R@10",
    "photographs.i2t_r1": "image to text R@1",
    "photographs.i2t_r5": "R@5",
    "photographs.i2t_r10": "R@10",
    "coco.t2i_r1": "COCO R@1",
    "coco.t2i_r10": "COCO R@10",
    "captions.cider": "CIDEr",
    "captions.bleu4": "BLEU-4",
}
ASKED = {"base", "requests"}  # rows of which it is measured whether an image comes when one is asked for
KINDS = {"images, as trained": "asked for", "words, as trained": "else", "images, with bias": "asked for, bias",
         "words, with bias": "else, bias"}  # fmt: skip
GROWING = {  # R@1 of queries of so many captions
    kind: {f"growing.{kind}, {n}": str(n) for n in range(1, SENTENCES + 1)}
    for kind in ("text", "dialogue", "others between", "mean")
}
SHOTS_SHOWN = {
    f"few shot.{name}, {n} shown": f"{told}, {n}" for name, told in (("cider", "CIDEr"), ("bleu4", "BLEU-4")) for n in SHOTS
}
QUESTIONS = {
    f"{kind}, {n} shown.{name}": f"{kind}, {n} shown" + ", without images" * (name != "right")
    for kind in ("yes or no", "how many")
    for n in EXAMPLES
    for name in ("right", "right without images")
}
SEARCHES = (  # in the sample of COCO
    "a man riding a wave on a surfboard",
    "a dog",
    "people skiing in the snow",
    "a plate of food on a table",
    "a train at a station",
)
COMES = {f"asking, {style}.{name}": f"{style}: {told}" for style in STYLES for name, told in KINDS.items()}


def prepare(args: argparse.Namespace) -> None:
    """Towers, shards and features, made once: out/features/train, held_out, coco and that of the judged file."""
    for name in (LM, VISION):
        get(name)
    sets = {"train": (args.train, args.images)}
    if not args.choose:
        sets[judges(args)] = args.judged, args.images
    if args.coco:
        sets["coco"] = args.coco / COCO_CAPTIONS, args.coco / "val2017"
    for name, (captions_file, images) in sets.items():
        shards, held_out = args.out / "shards" / name, args.held_out if name == "train" else 0.0
        of = {"captions": str(captions_file.resolve()), "images": str(images.resolve()), "held_out": held_out}
        SOURCE.begin(args.out / "sources" / name, of)
        if not is_packed(shards):
            print(pack_coco(captions_file, images, shards, val_fraction=held_out, overwrite=True).text())
    tower = load_vision(VISION)
    shards = args.out / "shards"
    parts = {"train": shards / "train" / "train", "held_out": shards / "train" / "val"}
    for name, place in (parts | {name: shards / name for name in sets if name != "train"}).items():
        store_features(str(place), args.out / "features" / name, tower, batch_size=32, workers=1)
    if not (args.out / "untrained" / "config.json").exists():
        torch.manual_seed(0)
        source = folder_of(LM)
        AutoTokenizer.from_pretrained(source).save_pretrained(args.out / "untrained")
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained(args.out / "untrained")


def changes(name: str) -> list[str]:
    """What a row changes of base, in words for `lightning fit`."""
    return ALONE if name in SOME else ROWS[name]


def words_of(name: str, out: Path, choose: bool) -> list[str]:
    """The words of a row for `lightning fit --config photos.yaml`, without its seed; features are in the folder `out`."""
    features, lm = out / "features", out / "untrained" if name == BLIND else LM
    shards = [str(features / "train" / "*.tar"), *([] if choose else [str(features / "held_out" / "*.tar")])]
    if name in SOME:
        shards = [str(features / "train" / f"{i:05d}.tar") for i in range(SOME[name])]
    return [
        f"--model.lm={lm}",
        f"--model.vision={VISION}",
        f"--data.train_shards={json.dumps(shards)}",
        f"--data.val_shards={features / 'held_out' if choose else 'null'}",  # else they are trained on
        *changes(name),
    ]


def trained_on(args: argparse.Namespace) -> dict[str, Any]:
    """What all trainings depend on: the photographs of the training, and what share of them is held out."""
    return {"train": source(args.train, args.images), "held_out": args.held_out}


def source(captions_file: Path, images: Path) -> dict[str, str]:
    """Captions and photographs: the file's name, and digests of both."""
    return {"file": captions_file.name, **source_of(captions_file, images)}


def judged_on(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a part's figures depend on beside the training: the photographs that judge, those of COCO, or none."""
    if part in OF_JUDGED:
        return {"judged": "held out" if args.choose else source(args.judged, args.images)}
    if part.startswith("asking"):
        return {}
    return {"coco": source(args.coco / COCO_CAPTIONS, args.coco / "val2017")}


def judges(args: argparse.Namespace) -> str:
    """The photographs that judge: the folder of their features, and of the figures that depend on them."""
    return "held_out" if args.choose else f"judged/{args.judged.stem}"


def parts(name: str, args: argparse.Namespace, model: Fromage) -> dict[str, Callable[[], Figures]]:
    """What is measured of a row: of each pass that was trained, requests of ASKED, what takes long of base alone."""
    features, words = args.out / "features", changes(name)
    judged, todo = read([features / judges(args)]), dict[str, Callable[[], Figures]]()
    if not {*CAPTIONING} & {*words}:
        todo["photographs"] = partial(recalls, model, judged)
    if not {*ALONE} & {*words}:
        todo["captions"] = partial(captions, model, judged)
    if args.coco and "photographs" in todo:
        coco = read([features / "coco"])
        todo["coco"] = partial(recalls, model, coco)
    if name in ASKED:
        todo |= {f"asking, {style}": partial(asking, model, style) for style in STYLES}
    if name == BARE:
        todo["growing"] = partial(growing, model, judged, seen=False)
    if name != "base":
        return todo
    todo |= {"growing": partial(growing, model, judged), "few shot": partial(few_shot, model, judged, 500)}
    if args.coco:
        for kind, questions in ask(args.coco / "instances_val2017_sample.json", coco).items():
            todo |= {f"{kind}, {n} shown": partial(answers, model, coco, questions, n) for n in EXAMPLES}
    return todo


def run(name: str, args: argparse.Namespace, seed: int) -> Run:
    """Train and judge a row with one seed; what was measured before is not measured again."""
    folder = args.out / ("chosen" if args.choose else "runs") / name.replace(" ", "_") / f"seed{seed}"
    print(f"\n== {name}, seed {seed}", flush=True)
    of = {
        "words": words_of(name, Path(), args.choose),
        "options": args.options,
        "configs": configs(CONFIG),
        **trained_on(args),
    }
    words = words_of(name, args.out, args.choose)
    words += [f"--{what}={seed}" for what in ("seed_everything", "model.seed", "data.seed")]
    checkpoint, origin = trained(
        folder,
        lambda: train(folder, words, args.options),
        finished(folder / "run") is not None,
        folder.glob("figures/**/*.json"),
        **of,
    )
    model = load_model(checkpoint)
    made: dict[str, Run] = {}
    for part, measure in parts(name, args, model).items():
        place = folder / "figures" / (judges(args) if part in OF_JUDGED else "") / f"{part.replace(' ', '_')}.json"
        made[part] = measured(place, measure, origin["checkpoint"], **of, **judged_on(part, args))
        print(part, flush=True)
    if "coco" in made and not (sheet := folder / "coco_searches.png").exists():
        index = build_index(
            model, str(args.out / "shards" / "coco"), folder / "coco_index", checkpoint=checkpoint, overwrite=True
        )
        draw_searches(model, index, SEARCHES, sheet)
    return together(made) | origin


def together(parts: dict[str, Run]) -> Run:
    """All figures of a run, PART.FIGURE, with commit and machine of its first part; the commits of later ones, if others.

    The setting is of all parts together.
    """
    first = next(iter(parts.values()))
    figures = {f"{part}.{what}": value for part, run in parts.items() for what, value in run["figures"].items()}
    later = {part: run["commit"] for part, run in parts.items() if run["commit"] != first["commit"]}
    setting = {what: value for run in parts.values() for what, value in run["setting"].items()}
    return first | ({"later": later} if later else {}) | {"setting": setting, "figures": figures}


def baselines(args: argparse.Namespace) -> Runs:
    """The linear baseline, its weight chosen on the photographs held out, and chance; both without a seed."""
    features = args.out / "features"

    def linear() -> Figures:
        model = Fromage.load(LM, VISION)
        train_set, held_out, judged = (read([features / name]) for name in ("train", "held_out", judges(args)))
        fitted = {weight: Ridge(model, train_set, weight) for weight in RIDGE}
        best = max(RIDGE, key=lambda weight: fitted[weight].recalls(held_out)["t2i_r10"])
        both = read([features / "train", features / "held_out"])
        return {"weight": best, **named(Ridge(model, both, best).recalls(judged))}

    def named(figures: Figures) -> Figures:
        return {f"photographs.{name}": value for name, value in figures.items()}

    made = {"linear": linear, "chance": lambda: named(chance(len(read([features / judges(args)]).names)))}
    beside = args.out / "baselines" / judges(args)
    of = {"lm": LM, "vision": VISION, **trained_on(args), **judged_on("photographs", args)}
    return {name: {"none": measured(beside / f"{name}.json", measure, **of)} for name, measure in made.items()}


def main() -> None:
    """Read the command line, run, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*ROWS, *SOME]
    for name in ("train", "judged"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="captions in COCO's format")
    parser.add_argument("--images", type=Path, required=True, help="folder of the photographs")
    parser.add_argument("--coco", type=Path, help="folder of a sample of COCO")
    parser.add_argument("--out", type=Path, required=True, help="folder of shards, features and runs")
    parser.add_argument("--held-out", type=float, default=0.085, help="share of the training photographs to choose on")
    parser.add_argument("--choose", action="store_true", help="judge on the photographs held out, and do not train on them")
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="ROW", help=", ".join(known))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the figures of each seed and their means")
    parser.add_argument("options", nargs="*", help="after --: further words for `lightning fit`")
    args = parser.parse_args()
    begin(args.threads)
    prepare(args)
    setting = {
        "judged": "held out" if args.choose else args.judged.name,
        "train": args.train.name,
        "held_out": args.held_out,
        "coco": args.coco and args.coco.name,
    }
    first: Runs = {} if args.choose else baselines(args)
    collect(args.json, first, **setting)
    runs = first | every(args.only, args.seeds, lambda name, seed: run(name, args, seed), args.json, **setting)
    print(f"\n{table(SHOWN, runs)}\n\nin %, mean and standard deviation")
    further = {f"R@1 of queries of one to five captions: {kind}": shown for kind, shown in GROWING.items()}
    further["captions after other photographs with theirs"] = SHOTS_SHOWN
    further["questions answered right"] = QUESTIONS
    further["answers that bring an image, where one is asked for and else"] = COMES
    for heading, shown in further.items():
        some = {
            name: seeds
            for name, seeds in runs.items()
            if any(shown.keys() & run["figures"].keys() for run in seeds.values())
        }
        if some:
            print(f"\n{heading}\n\n{table(shown, some)}")


if __name__ == "__main__":
    main()
