"""Verbs of evaluation: FROMAGe's tables, each beside the frozen CLIP and chance, and those of Octopus."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from fromage.cli.verb import DEVICE, JSON, QUESTION, Option, Verbs, natural, option, out_folder, positive, save_json


def coco(args: argparse.Namespace) -> None:
    """Captions and images of COCO: recall both ways."""
    _captions(args, "coco")


def flickr30k(args: argparse.Namespace) -> None:
    """Captions and images of Flickr30k: recall both ways."""
    _captions(args, "flickr30k")


def _captions(args: argparse.Namespace, name: Any) -> None:
    from fromage.evals.caption_sets import read_captions
    from fromage.evals.coco import evaluate

    data = read_captions(args.annotations, args.images, name, args.split, args.limit)
    _tell(args, evaluate(_model(args), data, name, _options(args), args.captioning))


def vist(args: argparse.Namespace) -> None:
    """Stories of VIST: which image is the last one."""
    from fromage.evals.vist import evaluate, read_stories

    data = read_stories(args.annotations, args.images, args.limit)
    _tell(args, evaluate(_model(args), data, _options(args)))


def visdial(args: argparse.Namespace) -> None:
    """Dialogues of VisDial: rank answers, and find the image."""
    from fromage.evals.dialogues import read_dialogues
    from fromage.evals.visdial import evaluate

    data = read_dialogues(args.annotations, args.dense, args.images, args.limit)
    _tell(args, evaluate(_model(args), data, _options(args), args.answers, args.scores))


def few_shot(args: argparse.Namespace) -> None:
    """Learning from examples in the prompt, on the toy world."""
    from fromage.evals.few_shot import evaluate

    _tell(args, evaluate(_model(args), args.world, args.shots, args.limit))


def refcoco(args: argparse.Namespace) -> None:
    """Octopus: referring expressions of RefCOCO, RefCOCO+ or RefCOCOg, the object meant among all."""
    from fromage.evals.refcoco import evaluate
    from fromage.octopus.sources import RefCOCO

    refs, instances, images = (str(path) for path in (args.refs, args.instances, args.images))
    _ask(args, evaluate, RefCOCO(refs, instances, images, args.split, args.question, args.limit, args.match))


def pope(args: argparse.Namespace) -> None:
    """Octopus: questions of POPE, whether something is in an image."""
    from fromage.evals.pope import evaluate
    from fromage.octopus.sources import Pope

    _ask(args, evaluate, Pope(str(args.file), str(args.images), args.limit))


def instructions(args: argparse.Namespace) -> None:
    """Octopus: instructions of LLaVA's kind, answers that point at several objects among them."""
    from fromage.evals.instructions import evaluate
    from fromage.octopus.sources import Instructions

    _ask(args, evaluate, Instructions(str(args.file), str(args.images), args.padded, args.limit))


def _ask(args: argparse.Namespace, evaluate: Callable[..., dict[str, Any]], data: Any) -> None:
    from fromage.octopus.module import load_octopus

    len(data)  # what is wrong with the files is told before towers are loaded
    _tell(args, evaluate(load_octopus(args.ckpt, args.device), data, _options(args)))


def _model(args: argparse.Namespace) -> Any:
    from fromage.models.fromage import load_model

    return load_model(args.ckpt, args.device)


def _options(args: argparse.Namespace) -> Any:
    from fromage.retrieval.encode import Options

    return Options(**{field.name: getattr(args, field.name) for field in fields(Options) if hasattr(args, field.name)})


def _tell(args: argparse.Namespace, report: dict[str, Any]) -> None:
    from fromage.evals.report import markdown, table

    print(table(report))
    if report["headline"]:
        print("\n" + markdown(report))
    if args.json:
        save_json(args.json, report)


COMMON: list[Option] = [
    option("--ckpt", required=True, help="checkpoint of `lightning fit`; of FROMAGe also a folder or hub name"),
    JSON,
    option("--limit", type=positive, help="look at the first so many only (images, stories, dialogues, examples)"),
    DEVICE,
]
FILES: list[Option] = [
    *COMMON,
    option("--images", type=Path, required=True, help="folder of the images"),
    option("--batch-size", type=positive, default=64, help="texts or images in a pass"),
    option("--workers", type=natural, default=0, help="processes that decode images"),
    option("--max-lost", type=float, default=0.05, help="share of the images that may be missing or broken"),
]
IMAGES: list[Option] = [*FILES, option("--no-clip", dest="clip", action="store_false", help="without the baseline")]
CAPTIONS: list[Option] = [
    *IMAGES,
    option("--split", choices=("train", "val", "test"), default="test", help="of Karpathy's splits"),
    option("--captioning", action="store_true", help="caption the images too: BLEU, METEOR, ROUGE-L, CIDEr; wants Java"),
]
VERBS: Verbs = {
    ("eval", "coco"): (
        coco,
        [option("annotations", type=Path, help="captions_val2017.json, or dataset_coco.json of Karpathy"), *CAPTIONS],
    ),
    ("eval", "flickr30k"): (
        flickr30k,
        [option("annotations", type=Path, help="dataset_flickr30k.json of Karpathy"), *CAPTIONS],
    ),
    ("eval", "vist"): (vist, [option("annotations", type=Path, help="val.story-in-sequence.json"), *IMAGES]),
    ("eval", "visdial"): (
        visdial,
        [
            option("annotations", type=Path, help="visdial_1.0_val.json"),
            option("--dense", type=Path, required=True, help="visdial_1.0_val_dense_annotations.json"),
            option("--no-answers", dest="answers", action="store_false", help="image from dialogue only"),
            option(
                "--scores", type=out_folder, help="folder of answers' scores, by which a run that was killed is taken up"
            ),
            *IMAGES,
        ],
    ),
    ("eval", "refcoco"): (
        refcoco,
        [
            option("refs", type=Path, help="refs(unc).p, refs(google).p or refs(umd).p"),
            option("--instances", type=Path, required=True, help="instances.json that came with it"),
            option("--split", default="val", help="val, and by the file testA, testB, test or train"),
            QUESTION,
            option("--match", metavar="REGEX", help="only expressions in which this is found, such as '(left|right)'"),
            *FILES,
        ],
    ),
    ("eval", "pope"): (pope, [option("file", type=Path, help="coco_pope_random.json or another of POPE's"), *FILES]),
    ("eval", "instructions"): (
        instructions,
        [
            option("file", type=Path, help="JSON of LLaVA's instructions"),
            option("--padded", action="store_true", help="boxes are shares of the image padded to a square"),
            *FILES,
        ],
    ),
    ("eval", "few-shot"): (
        few_shot,
        [
            option("--world", type=Path, required=True, help="folder of `fromage toy make`"),
            option("--shots", type=int, nargs="+", default=[0, 1, 2, 4], help="examples in front of a question"),
            *COMMON,
        ],
    ),
}
