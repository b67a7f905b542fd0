"""The verb that searches an image index."""

from __future__ import annotations

import argparse
from pathlib import Path

from fromage.cli.verb import DEVICE, Verbs, option, out_png, positive
from fromage.errors import UserError


def search(args: argparse.Namespace) -> None:
    """Print the images found for each text or image, and draw them."""
    import numpy as np

    from fromage.apps.screen import Screen
    from fromage.images.codec import to_png
    from fromage.images.open import open_image
    from fromage.io import write_files
    from fromage.retrieval.embed_images import embed_opened
    from fromage.retrieval.open_index import open_index
    from fromage.retrieval.results import draw_hits, left_out, load_images

    if not args.text and not args.image:
        raise UserError("search: give texts, or images with --image")
    images = [open_image(path) for path in args.image]
    model, index = open_index(args.index, args.ckpt, args.device)
    queries = np.concatenate([model.embed_text(args.text).float().cpu().numpy(), embed_opened(model, images)])  # (B, q)
    asked, hits = [*args.text, *args.image], index.search(queries, args.k)
    screen = Screen()
    for query, found in zip(asked, hits, strict=True):
        screen.line(query)
        for hit in found:
            screen.line(hit.line())
    if args.png:
        drawn = [load_images(index.beyond(query, found), args.k) for query, found in zip(queries, hits, strict=True)]
        for note in (note for _, lost in drawn for note in left_out(lost)):
            screen.complain(note)
        page = draw_hits(asked, [opened for opened, _ in drawn])
        write_files(args.png.parent, {args.png.name: to_png(page)})
        screen.line(f"drawn: {args.png}")


VERBS: Verbs = {
    ("search",): (
        search,
        [
            option("text", nargs="*", help="what to look for; several texts make several rows"),
            option("--image", action="append", default=[], help="an image to look for, file or URL; may be repeated"),
            option("--index", type=Path, required=True, help="folder of `fromage index build`"),
            option("--ckpt", type=Path, help="checkpoint, when it has moved since the index was built"),
            option("-k", type=positive, default=5, help="images per query"),
            option("--png", type=out_png, help="draw the images into this file"),
            DEVICE,
        ],
    ),
}
