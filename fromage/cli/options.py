"""What options mean that several commands have, and how their words are checked before any work."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fromage.errors import UserError

DType = Literal["float32", "bfloat16", "float16"]
Check = Callable[[str], Any]


def _number(kind: type[int] | type[float], least: float, most: float = 1e15) -> Check:
    def check(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(least - 1)
        if not least <= value <= most:
            allowed = f"from {least:g}" + (f" to {most:g}" if most < 1e15 else " on")
            raise ArgumentTypeError(f"{text}: give a {'whole ' * (kind is int)}number {allowed}")
        return value

    return check


positive, natural, amount, fraction = _number(int, 1), _number(int, 0), _number(float, 0), _number(float, 0, 1)


def out_folder(text: str) -> Path:
    """A folder to write later. Raises UserError now where it can be neither made nor written to."""
    path = Path(text)
    there = next(p for p in (path, *path.parents) if os.access(p, os.F_OK))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{path}: {there} is no folder that can be written to; name another place")
    return path


def out_file(text: str) -> Path:
    """A file to write later; its folder is made then. Raises UserError as `out_folder` does."""
    path = Path(text)
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is there, and no file; name another")
    return out_folder(str(path.parent)) / path.name


def out_png(text: str) -> Path:
    """An image file to write later. Raises UserError for a name that does not end in .png."""
    if not str(text).lower().endswith(".png"):  # jsonargparse checks a second time, then a path
        raise UserError(f"{text}: name a file that ends in .png")
    return out_file(text)


# name: what a command's docstring need not repeat, and the check of its words. One name means one thing everywhere.
SHARED: dict[str, tuple[str, Check | None]] = {
    "batch_size": ("images or texts per batch", positive),
    "captions": ("captions of a folder of images: .tsv, .jsonl, COCO's JSON or JSON of {file name: caption}", None),
    "ckpt": ("checkpoint of `lightning fit`, folder or hub name", None),
    "config": ("configuration, as for `lightning fit`", None),
    "device": ("cpu, cuda or mps", None),
    "embeddings": ("folder of `fromage index embed`", None),
    "images": ("folder of the images", None),
    "index": ("folder of `fromage index build`", None),
    "json": ("write all figures into this file", out_file),
    "k": ("images per query", positive),
    "kind": ("flat, or a FAISS factory string such as IVF4096,SQ8 (default: flat up to a million images)", None),
    "limit": ("evaluate only the first N images, stories, dialogues or examples", positive),
    "lm": ("language model (overrides the config)", None),
    "max_new_tokens": ("length of the answer, in tokens, at most", None),
    "milvus": ("build in Milvus: its address, or a path that ends in .db; --kind is then flat, HNSW,M=32 ...", None),
    "out": ("folder to write", out_folder),
    "per_shard": ("images per shard", positive),
    "overwrite": ("replace what is there already", None),
    "png": ("draw into this file", out_png),
    "question": ("question that an expression is put into, in place of {}", None),
    "val_fraction": ("share of the images that go to OUT/val, the others to OUT/train (default: 0, all to OUT)", fraction),
    "vision": ("image tower, as in a configuration", None),
    "vision_weights": ("weights of the image tower, as in a configuration", None),
    "workers": ("processes that decode images", natural),
    # of one command each, but with a check
    "actors": ("with --ray: copies of the image tower", positive),
    "gpus": ("with --ray: GPUs of each copy, also 0.5 (default: 1 with --device cuda, else 0)", amount),
    "max_broken": ("share of broken samples that training will allow, 0 to 1", fraction),
    "samples": ("samples on the contact sheet", natural),
    "scores": ("folder of the answers' scores; a run that was killed continues from it", out_folder),
    "top": ("other candidates that are drawn, at most", natural),
}
FILES = [name for name, (_, check) in SHARED.items() if check in (out_file, out_png)]
SHORT = {"config": "-c"}
BARE = {"ray": "local"}  # the value of an option that is given without one


def check_out(values: dict[str, Any]) -> None:
    """Raise UserError where a file that a command is to write is there already and --overwrite is not given."""
    from fromage.io import check_new

    for name in FILES:
        if isinstance(values.get(name), Path):
            check_new(values[name], values["overwrite"])


def save_json(path: Path | None, value: Any) -> None:
    """Write JSON, whole, if a path is given. Raises UserError where the disk does not take it."""
    from fromage.io import as_json, write_files

    if path:
        write_files(path.parent, {path.name: as_json(value)})


def save_png(path: Path, image: Any) -> None:
    """Write an image as PNG, whole."""
    from fromage.images.codec import to_png
    from fromage.io import write_files

    write_files(path.parent, {path.name: to_png(image)})
