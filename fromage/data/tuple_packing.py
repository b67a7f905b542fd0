"""Packing tuples for composition learning (fromage.data.tuples) into webdataset shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fromage.data.annotations import FILE, TEXT, problem
from fromage.data.caption_files import Skipped, check_there, json_lines
from fromage.data.packing import PackReport, as_jpeg, pack
from fromage.data.sample_images import TARGET_IMAGE
from fromage.data.shard_writer import members_of
from fromage.data.tuples import CONDITION, TARGET

LINE = '{"image": path, "caption": text, "condition": text, "target_caption": text}, where it is there "target_image": path'
TEXTS = {"caption": "caption", CONDITION: "condition", TARGET: "target caption"}  # field -> its name for people


class StoredTuple(NamedTuple):
    """A tuple before its images are read; meta as of Pair."""

    key: str
    image: str
    texts: dict[str, str]  # by field, as TEXTS
    shown: Path | None  # the target image
    meta: dict[str, Any]


def pack_tuples(
    jsonl: Path,
    out: Path,
    images: Path | None = None,
    per_shard: int = 1000,
    val_fraction: float = 0.0,
    overwrite: bool = False,
) -> PackReport:
    """Pack JSON lines of tuples, as LINE has them, into shards; a tuple's key is the number of its line.

    Otherwise as fromage.data.packing.pack_tsv. All tuples of a reference image are on the same side of val_fraction.

    Raises:
        UserError: as pack_tsv does.
    """
    check_there(jsonl, f"a file of lines {LINE}")
    report = PackReport(unit="tuple")
    samples = list(tuple_lines(jsonl, images or jsonl.parent, report))
    return pack(samples, members, report, out, per_shard, val_fraction, overwrite)


def tuple_lines(jsonl: Path, images: Path, skipped: Skipped) -> Iterator[StoredTuple]:
    """The tuples of JSON lines; images: folder that paths are relative to. Lines that are no tuple go to skipped."""
    for number, fields in json_lines(jsonl, skipped):
        image: Any = fields.get("image")
        shown: Any = fields.get("target_image")
        texts = {name: _text(fields.get(name)) for name in TEXTS}
        if problem(image, FILE) or (shown is not None and problem(shown, FILE)):
            skipped.skip(f"line {number}", "no image" if problem(image, FILE) else "target_image is no file name")
        elif lacking := next((TEXTS[name] for name, said in texts.items() if not said), None):
            skipped.skip(f"line {number}", f"no {lacking}, or an empty one")
        else:
            meta = {"source": image, "line": number} | ({"target_image": shown} if shown else {})
            yield StoredTuple(f"{number:09d}", str(images / image), texts, images / shown if shown else None, meta)


def _text(said: Any) -> str:
    """A text without surrounding space; '' for what is none."""
    return "" if problem(said, TEXT) else said.strip()


def members(sample: StoredTuple, report: PackReport) -> dict[str, bytes]:
    """The members of a tuple, by extension. Raises BrokenSample for an image that cannot be used."""
    jpeg, shown = as_jpeg(Path(sample.image)), as_jpeg(sample.shown) if sample.shown else None
    report.pairs += 1
    found = members_of(jpeg, sample.texts["caption"], {"key": sample.key, **sample.texts, **sample.meta})
    return found | ({f"{TARGET_IMAGE}jpg": shown} if shown else {})
