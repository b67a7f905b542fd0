"""Commands of composition learning: tuples of an image, a condition and what both ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fromage.cli.command import Result
from fromage.cli.options import check_free
from fromage.cli.shards import Packing
from fromage.config import DType


def shards_tuples(jsonl: Path, *, images: Path | None = None, packing: Packing) -> Result:
    """Pack JSON lines of tuples into shards, for composition learning.

    Args:
        jsonl: lines {"image": path, "caption": text, "condition": text, "target_caption": text}; "target_image": path, where
            that image is there
        images: folder that the images' paths start from (default: the file's own)
    """
    from fromage.data.tuple_packing import pack_tuples

    return packing.done(pack_tuples, jsonl, images=images)


def tuples_toy(
    *, out: Path, count: int = 8192, split: Literal["train", "val"] = "train", changes: int = 1, seed: int = 0,
    overwrite: bool = False,
) -> Result:  # fmt: skip
    """Write tuples of the toy world by rule, with target images: OUT/tuples.jsonl.

    An object has another colour, size or place, one is added, the ground is another, or it is night instead of day. Pack
    them by `fromage shards tuples`.

    Args:
        count: tuples
        changes: tuples of each reference image, 1 to 4, one after the other; with several the image alone does not tell
            which target is asked for
        split: scenes of training, or of validation, which no training has seen
        seed: seed of the scenes and changes
    """
    check_free(out, overwrite, "*")
    from fromage.toy.tuples import LINES, make_tuples

    counts = make_tuples(out, count, split, changes, seed)
    kinds = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    return Result(f"{count} tuples ({kinds}): {out / LINES}", {"kinds": counts, "out": str(out)})


def tuples_make(
    captions: Path, *, out: Path, lm: str, images: Path | None = None, batch_size: int = 16, max_new_tokens: int = 40,
    temperature: float = 0.7, top_p: float = 0.9, seed: int = 0, limit: int | None = None, dtype: DType = "float32",
    device: str = "auto", overwrite: bool = False,
) -> Result:  # fmt: skip
    """Have a language model write tuples from captions: OUT/tuples.jsonl, without target images.

    It is shown a few examples, and what is of no use is left out and counted in OUT/report.json. After a kill the same
    command goes on. Pack them by `fromage shards tuples`.

    Args:
        captions: captions of images: .tsv, .jsonl, COCO's JSON or JSON of {file name: caption}; of each image the first one
        lm: causal language model, by a name on the hub, a folder, or a name of `fromage towers list`
        images: folder that the images' paths start from (default: the captions' own)
        batch_size: captions at a time
        max_new_tokens: length of a condition, and of a target caption, in tokens, at most
        temperature: of sampling; 0 takes the most likely token each time
        top_p: draw from the most likely tokens whose probabilities add up to this, 0 to 1
        seed: seed of the sampling
        limit: only the first N images
        dtype: number type of the language model
    """
    from fromage.apps.tuples import LINES, write_tuples
    from fromage.generation.tuple_writer import Sampling

    sampling = Sampling(batch_size, max_new_tokens, temperature, top_p, seed)
    report = write_tuples(captions, out, lm, images, sampling, dtype, device, limit, overwrite)
    lines = [f"{report['kept']} tuples of {report['count']} captions: {out / LINES}"]
    causes = sorted(report["left_out"].items(), key=lambda item: -item[1])
    return Result.of([*lines, *(f"  {count:7} left out, {cause}" for cause, count in causes)], report)
