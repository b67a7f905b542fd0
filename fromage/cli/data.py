"""Verbs before and around training: the toy world, shards, stored features, the plan of a run."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from fromage.cli.verb import DEVICE, JSON, OUT, Verbs, natural, option, out_folder, out_png, positive, save_json

PER_SHARD = option("--per-shard", type=positive, default=1000, help="pairs per shard")


def share(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= (value := float(text)) <= 1:
        raise ValueError
    return value


def toy_make(args: argparse.Namespace) -> None:
    """Write the toy world."""
    from fromage.toy.world import make_world

    print(make_world(args.out, args.seed, args.train, args.val, refs=args.refs))


def toy_demo(args: argparse.Namespace) -> None:
    """Make a world, train on it, evaluate, index and search."""
    from fromage.apps.toy_demo import demo

    demo(args.out)


def shards_tsv(args: argparse.Namespace) -> None:
    """Pack a TSV of caption and image."""
    from fromage.data.packing import pack_tsv

    print(pack_tsv(args.tsv, args.out, args.images, args.per_shard))


def shards_coco(args: argparse.Namespace) -> None:
    """Pack a COCO caption file and its images."""
    from fromage.data.packing import pack_coco

    print(pack_coco(args.annotations, args.images, args.out, args.per_shard, args.captions))


def shards_check(args: argparse.Namespace) -> None:
    """Report what shards hold: broken samples by cause, duplicates, lengths, sizes."""
    import sys

    from fromage.data.shard_stats import check_shards, count_words
    from fromage.images.codec import to_png
    from fromage.io import write_files

    measure, unit = count_words, "words"
    if args.tokenizer:
        from fromage.models.language_model import load_tokenizer

        tokenizer, unit = load_tokenizer(args.tokenizer), "tokens"
        measure = lambda text: len(tokenizer.caption(text, sys.maxsize))  # noqa: E731
    report = check_shards(args.shards, args.max_broken, args.workers, args.samples, measure, unit)
    print(report.text())
    if args.json:
        save_json(args.json, report.figures())
    if args.png:
        write_files(args.png.parent, {args.png.name: to_png(report.image())})


def features(args: argparse.Namespace) -> None:
    """Store each image's pooled features in place of it, or beside it."""
    from fromage.data.features import store_features
    from fromage.models.vision.registry import load_vision

    vision = load_vision(args.vision, args.vision_weights, args.dtype).to(args.device)
    done = store_features(args.shards, args.out, vision, args.batch_size, args.keep_images, decoding=args.decoding)
    print(f"{done} samples -> {args.out}")


def plan(args: argparse.Namespace) -> None:
    """Count a run's parameters, memory, work and time, without weights."""
    from fromage.training.configs import find_config
    from fromage.training.memory_planner import Run, as_json, plan, read_run, report

    options = {f.name: getattr(args, f.name) for f in fields(Run) if hasattr(args, f.name)}
    counted = plan(read_run(find_config(args.config), **options))
    print(report(counted, args.device_tflops, args.share))
    if args.json:
        save_json(args.json, as_json(counted, args.device_tflops, args.share))


VERBS: Verbs = {
    ("toy", "make"): (
        toy_make,
        [
            OUT,
            option("--seed", type=int, default=0),
            option("--train", type=int, default=8192, help="training pairs"),
            option("--val", type=int, default=1000, help="validation pairs, scenes never seen in training"),
            option("--refs", type=int, default=500, help="images of several objects with words for each, per split"),
        ],
    ),
    ("toy", "demo"): (toy_demo, [option("--out", type=out_folder, default=Path("runs/demo"), help="run folder")]),
    ("shards", "tsv"): (
        shards_tsv,
        [
            option("tsv", type=Path, help="lines of caption, tab, image"),
            OUT,
            option("--images", type=Path, help="folder the images' paths start from (the TSV's own)"),
            PER_SHARD,
        ],
    ),
    ("shards", "coco"): (
        shards_coco,
        [
            option("annotations", type=Path, help="COCO caption JSON"),
            option("--images", type=Path, required=True, help="folder of its images"),
            OUT,
            option("--captions", choices=("all", "first"), default="all", help="captions used per image"),
            PER_SHARD,
        ],
    ),
    ("shards", "check"): (
        shards_check,
        [
            option("shards", nargs="+", help="folders, patterns or brace expressions of shards"),
            option("--max-broken", type=share, default=0.05, help="share of broken samples that training is to allow"),
            option("--tokenizer", help="count captions in this language model's tokens (words)"),
            option("--samples", type=natural, default=20, help="samples on the contact sheet"),
            option("--workers", type=natural, default=4, help="processes that decode"),
            JSON,
            option("--png", type=out_png, help="draw random samples with their captions"),
        ],
    ),
    ("features",): (
        features,
        [
            option("shards", help="folder, pattern or brace expression of shards"),
            OUT,
            option("--vision", default="ViT-L-14", help="image tower, as in a configuration"),
            option("--vision-weights", default="openai", help="its weights, as in a configuration"),
            option("--dtype", default="float32", choices=("float32", "bfloat16", "float16")),
            option("--batch-size", type=positive, default=256, help="images per batch"),
            option("--decoding", default="draft", choices=("draft", "exact"), help="of JPEGs, as in a configuration"),
            option("--keep-images", action="store_true", help="keep the images beside their features"),
            DEVICE,
        ],
    ),
    ("plan",): (
        plan,
        [
            option("--config", "-c", required=True, help="configuration, as for fit"),
            option("--lm", help="language model, in place of the configuration's"),
            option("--vision", help="image tower, likewise"),
            option("--dtype", choices=("float32", "bfloat16", "float16"), help="of the towers, likewise"),
            option("--step", choices=("fast", "plain"), help="way of training, likewise"),
            option("--batch-size", type=int, help="pairs per step and device, likewise"),
            option("--max-tokens", type=int, help="tokens of the longest caption, </s> and [RET] included, likewise"),
            option("--tokens", type=float, help="tokens of the mean caption, </s> included, [RET] not (13)"),
            option("--chunk", type=int, help="examples whose activations exist at a time, likewise"),
            option("--quantize", choices=("int8", "nf4"), help="of the language model's layers, likewise"),
            option("--activation-checkpointing", action="store_const", const=True, help="recompute layers, likewise"),
            option("--stored-features", action="store_const", const=True, help="train on features from `fromage features`"),
            option("--device-tflops", type=float, default=150, help="the device's rate in TFLOP/s; 150: an A6000 in bf16"),
            option("--share", type=float, default=0.5, help="share of that rate which training is assumed to reach"),
            JSON,
        ],
    ),
}
