"""Commands that make training data: shards of images and captions, their check, stored features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fromage.checks import check_real, check_whole
from fromage.cli.command import Result
from fromage.cli.options import check_free, save_png
from fromage.config import DType

if TYPE_CHECKING:
    from fromage.data.packing import PackReport


@dataclass(kw_only=True)
class Packing:
    """Where shards go, and how they are cut."""

    out: Path
    per_shard: int = 1000
    val_fraction: float = 0.0
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raise UserError where shards are there already, and --overwrite is not given."""
        for folder in (self.out / "train", self.out / "val") if self.val_fraction else (self.out,):
            check_free(folder, self.overwrite, "*.tar")

    def done(self, pack: Callable[..., PackReport], *args: Any, **named: Any) -> Result:
        """What packing has to say. pack: pack_tsv or another one of its kind; args and named: its further arguments."""
        cut = {"per_shard": self.per_shard, "val_fraction": self.val_fraction, "overwrite": self.overwrite}
        report = pack(*args, out=self.out, **cut, **named)
        return Result(report.text(), asdict(report))


def shards_tsv(tsv: Path, *, images: Path | None = None, packing: Packing) -> Result:
    """Pack a TSV of caption and image into shards, each image once with all its captions.

    Args:
        tsv: lines of caption, tab, image
        images: folder that the images' paths start from (default: the TSV's own)
    """
    from fromage.data.packing import pack_tsv

    return packing.done(pack_tsv, tsv, images=images)


def shards_jsonl(jsonl: Path, *, images: Path | None = None, packing: Packing) -> Result:
    """Pack JSON lines of image and captions into shards, each image once with all its captions.

    Args:
        jsonl: lines {"image": path, "captions": [text, ...]}
        images: folder that the images' paths start from (default: the file's own)
    """
    from fromage.data.packing import pack_jsonl

    return packing.done(pack_jsonl, jsonl, images=images)


def shards_coco(annotations: Path, *, images: Path, captions: Literal["all", "first"] = "all", packing: Packing) -> Result:
    """Pack a COCO caption file and its images into shards, each image once with all its captions.

    Args:
        annotations: COCO caption JSON
        captions: captions packed per image
    """
    from fromage.data.packing import pack_coco

    return packing.done(pack_coco, annotations, images, captions=captions)


def shards_check(
    shards: list[str], *, max_broken: float = 0.05, tokenizer: str | None = None, samples: int = 20, workers: int = 4,
    png: Path | None = None,
) -> Result:  # fmt: skip
    """Report what shards hold: broken samples by cause, duplicates, lengths, sizes.

    Args:
        shards: folders, patterns or brace expressions of shards
        tokenizer: language model in whose tokens captions are counted (default: words are counted)
        png: draw random samples with their captions into this file
    """
    import sys

    from fromage.data.shard_records import count_words
    from fromage.data.shard_stats import check_shards

    measure, unit = count_words, "words"
    if tokenizer:
        from fromage.models.language_model import load_tokenizer

        loaded, unit = load_tokenizer(tokenizer), "tokens"
        measure = lambda text: len(loaded.caption(text, sys.maxsize))  # noqa: E731
    report = check_shards(shards, max_broken, workers, samples, measure, unit)
    if png:
        save_png(png, report.image())
    return Result("\n".join([*([f"drawn: {png}"] if png else []), report.text()]), report.figures())


def features(
    shards: str, *, out: Path, vision: str = "ViT-L-14", vision_weights: str = "openai", dtype: DType = "float32",
    batch_size: int = 256, decoding: Literal["draft", "exact"] = "draft", keep_images: bool = False,
    workers: int | None = None, max_broken: float = 0.05, device: str = "auto",
) -> Result:  # fmt: skip
    """Store each image's pooled features in place of it, or beside it.

    Args:
        shards: folder, pattern or brace expression of shards
        dtype: number type in which the vision tower runs
        decoding: how JPEGs are decoded, as in a configuration
        keep_images: keep the images beside their features
        workers: processes that read images (default: for half of the cores, 4 at most)
        max_broken: share of the samples that may be broken, 0 to 1
    """
    from fromage.data.features import check_source, store_features
    from fromage.data.shard_sizes import read_sizes
    from fromage.models.vision.registry import load_vision
    from fromage.processor import find_device

    if workers is not None:
        check_whole("--workers", workers, 0)
    check_real("--max-broken", max_broken, 0, 1)
    check_source(shards, out)
    tower = load_vision(vision, vision_weights, dtype).to(find_device(device))
    count = store_features(shards, out, tower, batch_size, keep_images, workers, max_broken, decoding)
    there = sum(read_sizes(out).values())
    text = f"{count} samples encoded, {there} are there: {out}"
    return Result(text, {"samples": count, "there": there, "out": str(out)})
