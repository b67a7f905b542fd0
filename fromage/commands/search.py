"""Verbs of the image index: build it, search it."""

from __future__ import annotations

import argparse
from pathlib import Path

from fromage.commands.verb import DEVICE, OUT, Verbs, option


def index_build(args: argparse.Namespace) -> None:
    """Embed pictures with a checkpoint and save an index of them."""
    from fromage.checkpoint import load_model
    from fromage.index import build_index

    model = load_model(args.ckpt, args.device)
    build_index(model, args.images, args.out, args.batch_size, args.workers, args.captions, args.ckpt)
    print(f"index -> {args.out}")


def search(args: argparse.Namespace) -> None:
    """Print the pictures found for each text, and draw them."""
    from fromage.index import draw_hits, open_index, search_index

    model, index = open_index(args.index, args.ckpt, args.device)
    hits = search_index(model, index, args.text, args.k)
    for text, found in zip(args.text, hits, strict=True):
        print(text)
        for hit in found:
            print(f"  {hit.rank:3d}  {hit.score:.3f}  {hit.path}  {hit.caption}")
    if args.png:
        draw_hits(args.text, hits).save(args.png)
        print(f"drawn: {args.png}")


VERBS: Verbs = {
    ("index", "build"): (
        index_build,
        [
            option("--ckpt", type=Path, required=True, help="checkpoint of `lightning fit`"),
            option("--images", required=True, help="folder of pictures, or shards"),
            OUT,
            option("--captions", type=Path, help="COCO caption JSON, or {file name: caption}, for a folder"),
            option("--batch-size", type=int, default=64, help="pictures per batch"),
            option("--workers", type=int, default=0, help="processes that decode pictures"),
            DEVICE,
        ],
    ),
    ("search",): (
        search,
        [
            option("text", nargs="+", help="what to look for; several texts make several rows"),
            option("--index", type=Path, required=True, help="folder of `fromage index build`"),
            option("--ckpt", type=Path, help="checkpoint, when it has moved since the index was built"),
            option("-k", type=int, default=5, help="pictures per text"),
            option("--png", type=Path, help="draw the pictures into this file"),
            DEVICE,
        ],
    ),
}
