"""The verb that searches an image index."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fromage.commands.verb import DEVICE, Verbs, option
from fromage.errors import UserError


def search(args: argparse.Namespace) -> None:
    """Print the pictures found for each text or picture, and draw them."""
    import numpy as np

    from fromage.embed_pictures import embed_opened
    from fromage.hits import SPARE, draw_hits, openable
    from fromage.index import open_index
    from fromage.pictures import open_picture

    if not args.text and not args.image:
        raise UserError("search: give texts, or pictures with --image")
    pictures = [open_picture(path) for path in args.image]
    model, index = open_index(args.index, args.ckpt, args.device)
    queries = np.concatenate([model.embed_text(args.text).float().cpu().numpy(), embed_opened(model, pictures)])  # (B, q)
    asked, hits = [*args.text, *args.image], index.search(queries, args.k + (SPARE if args.png else 0))
    for query, found in zip(asked, hits, strict=True):
        print(query)
        for hit in found[: args.k]:
            print(f"  {hit.rank:3d}  {hit.score:.3f}  {hit.path}  {hit.caption}")
    if args.png:
        drawn = [openable(found, args.k) for found in hits]
        for note in (note for _, notes in drawn for note in notes):
            print(note, file=sys.stderr)
        draw_hits(asked, [opened for opened, _ in drawn]).save(args.png)
        print(f"drawn: {args.png}")


VERBS: Verbs = {
    ("search",): (
        search,
        [
            option("text", nargs="*", help="what to look for; several texts make several rows"),
            option("--image", action="append", default=[], help="a picture to look for, file or URL; may be repeated"),
            option("--index", type=Path, required=True, help="folder of `fromage index build`"),
            option("--ckpt", type=Path, help="checkpoint, when it has moved since the index was built"),
            option("-k", type=int, default=5, help="pictures per query"),
            option("--png", type=Path, help="draw the pictures into this file"),
            DEVICE,
        ],
    ),
}
