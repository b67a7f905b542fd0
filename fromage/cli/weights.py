"""Verbs of trained parameters: import the authors' files, export ours or theirs."""

from __future__ import annotations

import argparse
from pathlib import Path

from fromage.cli.verb import OUT, Verbs, option

DTYPES = ("bfloat16", "float32", "float16")


def import_weights(args: argparse.Namespace) -> None:
    """Turn the authors' released files into a folder of ours; no tower is loaded."""
    from fromage.checkpoints.authors import read_authors
    from fromage.checkpoints.format import write_folder
    from fromage.models.vision.registry import check_vision

    saved = read_authors(args.source, args.lm, args.vision, args.vision_weights, args.dtype)
    check_vision(saved.settings["vision"], saved.settings["vision_weights"])  # now, not when the folder is loaded
    write_folder(saved, args.out)
    print(f"{sum(t.numel() for t in saved.tensors.values()):,} parameters -> {args.out}")


def export_weights(args: argparse.Namespace) -> None:
    """Write trained parameters as a folder to publish, or as the authors' files."""
    from fromage.checkpoints.authors import write_authors
    from fromage.checkpoints.format import write_folder
    from fromage.checkpoints.load import read_saved
    from fromage.models.fromage import for_disk

    saved = for_disk(read_saved(args.ckpt), args.dtype)
    if args.format == "ours":
        write_folder(saved, args.out)
    else:
        write_authors(saved, args.out, args.visual_encoder)
    print(f"{sum(t.numel() for t in saved.tensors.values()):,} parameters -> {args.out}")


VERBS: Verbs = {
    ("import",): (
        import_weights,
        [
            option("source", type=Path, help="folder of pretrained_ckpt.pth.tar and model_args.json, or the former"),
            OUT,
            option("--lm", help="language model, in place of the one in model_args.json"),
            option("--vision", help="image tower, as in a configuration, likewise"),
            option("--vision-weights", help="its weights, as in a configuration"),
            option("--dtype", choices=DTYPES, default="bfloat16", help="of the towers, when the folder is loaded"),
        ],
    ),
    ("export",): (
        export_weights,
        [
            option("--ckpt", required=True, help="checkpoint of `lightning fit`, folder of trained parameters, or hub name"),
            OUT,
            option(
                "--format", choices=("ours", "authors"), default="ours", help="a folder for from_pretrained, or their files"
            ),
            option("--dtype", choices=DTYPES, help="of the numbers (a folder's own; bfloat16 for a Lightning checkpoint)"),
            option("--visual-encoder", help="with --format authors: the image tower's name on the Hugging Face hub"),
        ],
    ),
}
