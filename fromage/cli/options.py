"""What options mean that several commands have, and how their words are checked before any work."""

from __future__ import annotations

import errno
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fromage.checks import ADDRESSES
from fromage.errors import UserError, reason
from fromage.images.locators import split_locator
from fromage.io import set_aside, write_files

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
    if there != path:
        _try(path, next(p for p in (path, *path.parents) if p.parent == there))
    return path


def _try(path: Path, first: Path) -> None:
    """Make and remove the first folder of a path that is missing: some places refuse what their permissions allow."""
    try:
        first.mkdir()
        first.rmdir()
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another process begins there
            raise UserError(f"{path}: cannot be made ({reason(error)}); name another place") from error


def out_file(text: str) -> Path:
    """A file to write later; its folder is made then. Raises UserError as `out_folder` does."""
    path = Path(text)
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is there, and no file; name another")
    return out_folder(str(path.parent)) / path.name


def out_png(text: str) -> Path:
    """An image file to write later. Raises UserError for a name that does not end in .png."""
    if not text.lower().endswith(".png"):
        raise UserError(f"{text}: name a file that ends in .png")
    return out_file(text)


HERE = Path("-")  # in place of a file: standard output


def out_json(text: str) -> Path:
    """A JSON file to write later, or `HERE`. Raises UserError for a name that does not end in .json."""
    if text != str(HERE) and not text.lower().endswith(".json"):
        raise UserError(f"{text}: name a file that ends in .json, or say --json alone to print")
    return HERE if text == str(HERE) else out_file(text)


def out_jsonl(text: str) -> Path:
    """A file of lines of JSON to write later. Raises UserError for a name that does not end in .jsonl."""
    if not text.lower().endswith(".jsonl"):
        raise UserError(f"{text}: name a file that ends in .jsonl")
    return out_file(text)


def in_file(text: str) -> Path:
    """A file to read. Raises UserError where there is none."""
    path = Path(text)
    if not path.exists() or path.is_dir():
        raise UserError(f"{text}: {'is a folder' if path.is_dir() else 'no such file'}; name a file that is there")
    return path


def in_folder(text: str) -> Path:
    """A folder to read. Raises UserError where there is none."""
    if not Path(text).is_dir():
        raise UserError(f"{text}: {'is no folder' if Path(text).exists() else 'no such folder'}; name one that is there")
    return Path(text)


def in_place(text: str) -> Path:
    """A file or a folder to read. Raises UserError where there is none."""
    if not Path(text).exists():
        raise UserError(f"{text}: no such file or folder; name one that is there")
    return Path(text)


PATTERN = re.compile(r"[*?\[{:]|\.tar")  # in names of shards


def in_images(text: str) -> str:
    """A folder of images; what is a pattern, a URL or shards by its name is left to what reads it."""
    return text if PATTERN.search(text) else str(in_folder(text))


def in_shards(text: str) -> str:
    """Shards: a folder, a file, or a pattern or URL, which are left to what reads them."""
    return text if PATTERN.search(text) else str(in_place(text))


def in_image(text: str) -> str:
    """An image or a folder of images, or a URL. Raises UserError where there is none."""
    there = Path(text).exists() or Path(split_locator(text)[0]).exists()
    if not text.startswith(ADDRESSES) and not there:
        raise UserError(f"{text}: no such file; name an image that is there, or a URL")
    return text


def in_index(text: str) -> Path:
    """The folder of an index. Raises UserError where there is none."""
    if set_aside(Path(text).resolve()).exists():  # saving was interrupted
        from fromage.retrieval.index_folder import read_about

        read_about(Path(text))
    if not Path(text, "index.json").is_file():
        raise UserError(f"{text}: cannot be read as an index (no index.json); build one with: fromage index build")
    return Path(text)


def in_checkpoint(text: str) -> str:
    """A checkpoint: file, folder, run or name on the hub. Raises UserError for what is none of these."""
    from fromage.checkpoints.hub import HUB_NAME
    from fromage.checkpoints.run_folder import checkpoint_file, last_checkpoint

    path = Path(text)
    if path.is_dir() and not (path / "config.json").is_file() and not last_checkpoint(path):
        raise UserError(f"{text}: holds no checkpoint and no config.json; name a run's folder, or one of `fromage export`")
    if not path.exists() and not HUB_NAME.fullmatch(text):
        checkpoint_file(path)
    return text


def in_origin(text: str) -> str:
    """The origin of a web page. Raises UserError for what is none."""
    from fromage.serving.access import read_origin

    return read_origin(text)


def in_config(text: str) -> str:
    """A configuration, by name or path. Raises UserError where there is none."""
    from fromage.training.configs import find_config

    find_config(text)
    return text


def device(text: str) -> str:
    """The name of a device; whether it is there, PyTorch knows."""
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d+)?", text):
        raise ArgumentTypeError(f"{text}: give auto, cpu, cuda or mps")
    return text


# name: what a command's docstring need not repeat, and the check of its words. One name means one thing everywhere.
SHARED: dict[str, tuple[str, Check | None]] = {
    "batch_size": ("images or texts per batch", positive),
    "captions": ("captions of a folder of images: .tsv, .jsonl, COCO's JSON or JSON of {file name: caption}", None),
    "ckpt": ("checkpoint of `lightning fit`, folder of its run, exported folder or hub name", in_checkpoint),
    "config": ("configuration, as for `lightning fit`", in_config),
    "device": ("auto (the first there of cuda, mps and cpu), cpu, cuda or mps", device),
    "cors": ("", in_origin),
    "embeddings": ("folder of `fromage index embed`", in_folder),
    "image": ("the image, file or URL", in_image),
    "images": ("folder of the images", in_images),
    "images_per_ret": ("images per query", positive),
    "index": ("folder of `fromage index build`", in_index),
    "json": ("print JSON alone; with a file's name that ends in .json, write it there besides", out_json),
    "key": ("with --table: its column of paths, file names or keys within shards", None),
    "kind": ("flat, a FAISS factory string such as IVF4096,SQ8, or auto:small (default: flat up to a million images)", None),
    "limit": ("evaluate only the first N images, stories, dialogues or examples", positive),
    "lm": ("language model (overrides the config)", None),
    "max_new_tokens": ("length of the answer, in tokens, at most", positive),
    "milvus": ("build in Milvus: its address, or a path that ends in .db; --kind is then flat, HNSW,M=32 ...", None),
    "out": ("folder to write", out_folder),
    "per_shard": ("images or tuples per shard", positive),
    "overwrite": ("replace what is there already", None),
    "png": ("draw into this file", out_png),
    "quantize": (
        "hold the language model's layers in int8 or nf4 (4 bits; extra [quant]); none undoes training's",
        None,
    ),
    "question": ("question that an expression is put into, in place of {}", None),
    "table": ("metadata of the images: Parquet, or .jsonl", in_place),
    "val_fraction": ("share of the images that go to OUT/val, the others to OUT/train; with 0 all go to OUT", fraction),
    "vision": ("vision tower, as in a configuration", None),
    "vision_weights": ("weights of the vision tower, as in a configuration", None),
    "where": ("only images whose metadata fit, such as \"year >= 2019 and place = 'Rome'\"", None),
    "workers": ("processes that decode images", natural),
    # of one command each, but with a check
    "answers_file": ("", out_jsonl),
    "actors": ("with --ray: copies of the vision tower", positive),
    "dataset": ("", in_folder),
    "features": ("", out_folder),
    "gpus": ("with --ray: GPUs of each copy, also 0.5 (default: 1 with --device cuda, else 0)", amount),
    "max_broken": ("share of broken samples that training will allow, 0 to 1", fraction),
    "max_lost": ("", fraction),
    "octopus": ("", in_checkpoint),
    "port": ("", _number(int, 0, 65535)),
    "queue": ("", positive),
    "server_files": ("", out_folder),
    "shards": ("", in_shards),
    "samples": ("samples on the contact sheet", natural),
    "scores": ("folder of the answers' scores; a run that was killed continues from it", out_folder),
    "source": ("", in_place),
    "timeout": ("", amount),
    "top": ("other queries of a score from 0.5 on that are drawn, at most (default: all)", natural),
    "world": ("", in_folder),
}
DEFAULT: dict[Any, Check] = {Path: in_file}  # checks of types, where the name has none
SHORT = {"config": "-c", "images_per_ret": "-k"}
BARE = {"ray": "local", "json": str(HERE)}  # the value of an option that is given without one

FILES = [name for name, (_, check) in SHARED.items() if check in (out_json, out_png, out_jsonl)]  # written by name


def check_out(values: dict[str, Any]) -> None:
    """Raise UserError where a file that a command is to write is there already and --overwrite is not given."""
    from fromage.io import check_new

    for name in FILES:
        if isinstance(values.get(name), Path) and values[name] != HERE:
            check_new(values[name], values["overwrite"])


def check_free(folder: Path, overwrite: bool, *names: str) -> None:
    """Raise UserError where a folder holds files of these names or patterns, and --overwrite is not given."""
    from fromage.io import check_new

    if any(any(folder.glob(name)) for name in names):
        check_new(folder, overwrite)


def save(path: Path, content: bytes) -> None:
    """Write a file, whole. Raises UserError where the disk does not take it."""
    write_files(path.parent, {path.name: content})


def save_png(path: Path, image: Any) -> None:
    """Write an image as PNG, whole."""
    from fromage.images.codec import to_png

    save(path, to_png(image))
