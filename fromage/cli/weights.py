"""Commands that move trained parameters between formats on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fromage.cli.command import Result
from fromage.cli.options import check_free
from fromage.config import DType

if TYPE_CHECKING:
    from fromage.checkpoints.format import Saved


FOLDER, AUTHORS = ("config.json", "model.safetensors"), ("model_args.json", "pretrained_ckpt.pth.tar")  # what is written


def import_weights(
    source: Path, *, out: Path, lm: str | None = None, vision: str | None = None, vision_weights: str | None = None,
    dtype: DType = "bfloat16", overwrite: bool = False,
) -> Result:  # fmt: skip
    """Turn the authors' released files into a folder of ours; no tower is loaded.

    Args:
        source: folder of pretrained_ckpt.pth.tar (or another checkpoint of theirs) and model_args.json, or the former
        lm: language model (overrides model_args.json)
        vision: vision tower, as in a configuration (overrides model_args.json)
        dtype: number type of the towers when the folder is loaded
    """
    check_free(out, overwrite, *FOLDER)
    from fromage.checkpoints.authors import read_authors
    from fromage.checkpoints.format import write_folder
    from fromage.models.vision.registry import check_vision

    saved = read_authors(source, lm, vision, vision_weights, dtype)
    check_vision(saved.settings["vision"], saved.settings["vision_weights"])  # now, not when the folder is loaded
    write_folder(saved, out, overwrite)
    return _written(saved, out)


def export_weights(
    *, ckpt: str, out: Path, format: Literal["ours", "authors", "sentence-transformers"] = "ours",
    dtype: DType | None = None, visual_encoder: str | None = None, license: str | None = None, overwrite: bool = False,
) -> Result:  # fmt: skip
    """Write trained parameters, of FROMAGe or Octopus, as a folder to publish, or FROMAGe's as the authors' files.

    Args:
        format: a folder for from_pretrained, the same for SentenceTransformer too, or the authors' files
        dtype: number type of the parameters (default: a folder's own; for a Lightning checkpoint bfloat16, or float32 with
            --format sentence-transformers)
        visual_encoder: with --format authors: the vision tower's name on the Hugging Face hub
        license: licence of the parameters for the model card, as the hub names it, such as apache-2.0
    """
    check_free(out, overwrite, *(AUTHORS if format == "authors" else FOLDER))
    from fromage.checkpoints.authors import write_authors
    from fromage.checkpoints.card import licensed
    from fromage.checkpoints.format import write_folder
    from fromage.checkpoints.load import read_saved
    from fromage.cli.models import model_class
    from fromage.models.pretrained import for_disk

    saved = read_saved(ckpt)
    saved = replace(saved, about=licensed(saved.about, license))
    if dtype is None and format == "sentence-transformers" and not saved.added_tokens:  # rows as the checkpoint has them
        dtype = "float32"
    saved = for_disk(model_class(saved.kind), saved, dtype)
    if format == "ours":
        write_folder(saved, out, overwrite)
    elif format == "sentence-transformers":
        from fromage.interop.sentence_transformers_folder import write_sentence_transformers

        write_sentence_transformers(saved, out, overwrite)
    else:
        write_authors(saved, out, visual_encoder, overwrite)
    return _written(saved, out)


def _written(saved: Saved, out: Path) -> Result:
    count, of_lm = (
        sum(tensor.numel() for name, tensor in saved.tensors.items() if name.startswith(where)) for where in ("", "lm.")
    )
    told = f", {of_lm:,} of them of the language model, which was trained too" if of_lm else ""
    return Result(f"{count:,} parameters{told} -> {out}", {"parameters": count, "of_lm": of_lm, "out": str(out)})
