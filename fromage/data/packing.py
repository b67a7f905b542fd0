"""Packing image files and captions (a TSV, JSON lines, or COCO's caption file) into webdataset shards.

An image is packed once with all its captions, wherever they stand in the file. fromage.data.caption_files reads the pairs;
here are the split into training and validation, the images, and the report.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from tqdm import tqdm

from fromage.checks import check_real
from fromage.data.annotation_formats import read_coco_captions
from fromage.data.caption_files import Captioned, Pair, Reader, Skipped, by_image, check_there, jsonl_pairs, tsv_pairs
from fromage.data.shard_writer import check_no_shards, members_of, own_shards, remove_shards, write_members
from fromage.errors import BrokenSample, UserError, first_few
from fromage.images.codec import decode_image
from fromage.images.open import file_bytes
from fromage.io import read_json, write_json
from fromage.locks import held

JPEG = b"\xff\xd8\xff"  # first bytes of a JPEG file
SHOWN = 3  # names under a cause
REPORT = "report.json"  # beside the shards


class OfImage(Protocol):
    """What becomes one sample of a shard. meta: as of Pair."""

    @property
    def key(self) -> str: ...  # noqa: D102
    @property
    def image(self) -> str: ...  # noqa: D102
    @property
    def meta(self) -> dict[str, Any]: ...  # noqa: D102


Packed = TypeVar("Packed", bound=OfImage)


@dataclass
class PackReport(Skipped):
    """Result of packing: the number of images and of pairs, one per caption, and the names of what was skipped by cause."""

    images: int = 0
    pairs: int = 0
    unit: str = "image"
    folders: dict[str, int] = field(default_factory=dict)  # folder of shards -> its images

    def text(self) -> str:
        """The report for a terminal."""
        where = ", ".join(f"{count} in {folder}" for folder, count in self.folders.items())
        what = f"images with {self.pairs} captions" if self.unit == "image" else f"{self.unit}s"
        lines = [f"{self.images} {what} packed: {where}"]
        for cause, names in self.names.items():
            more = " in report.json" if len(names) > SHOWN else ""
            lines.append(f"  {len(names):7} skipped, {cause}: {first_few(names, few=SHOWN)}{more}")
        return "\n".join(lines)


def pack_tsv(
    tsv: Path,
    out: Path,
    images: Path | None = None,
    per_shard: int = 1000,
    val_fraction: float = 0.0,
    overwrite: bool = False,
) -> PackReport:
    """Pack a TSV of caption<TAB>image path into shards; an image's key is the number of its first line.

    An image that stands on several lines is packed once with all its captions. JPEG files are copied unchanged, other images
    are converted to JPEG. What cannot be used is skipped and listed in report.json beside the shards.

    Args:
        images: folder that paths are relative to, by default the TSV's own.
        per_shard: images per shard.
        val_fraction: share of the images, 0 to 1, that go to out/val, the others to out/train; 0 writes one set into out. An
            image's side follows from a hash of its path as it stands in the file, and stays when the file grows.
        overwrite: replace shards that out already contains.

    Raises:
        UserError: the TSV is missing, out already contains shards, or one side has no image that could be packed.
    """
    wanted = "a file with a caption, a tab and an image's path on each line"
    return _pack_pairs(tsv, tsv_pairs, wanted, out, images, per_shard, val_fraction, overwrite)


def pack_jsonl(
    jsonl: Path,
    out: Path,
    images: Path | None = None,
    per_shard: int = 1000,
    val_fraction: float = 0.0,
    overwrite: bool = False,
) -> PackReport:
    """Pack JSON lines {"image": path, "captions": [text, ...]} into shards, as pack_tsv does.

    The names of Hugging Face's image folders, "file_name" and "text", are understood too, and "caption" for one caption.

    Raises:
        UserError: as pack_tsv does.
    """
    wanted = 'a file of lines {"image": path, "captions": [text, ...]}'
    return _pack_pairs(jsonl, jsonl_pairs, wanted, out, images, per_shard, val_fraction, overwrite)


def _pack_pairs(
    file: Path,
    read: Reader,
    wanted: str,
    out: Path,
    images: Path | None,
    per_shard: int,
    val_fraction: float,
    overwrite: bool,
) -> PackReport:
    """Pack the pairs of a file, as pack_tsv says. wanted: what to name where the file is missing."""
    check_there(file, wanted)
    report = PackReport()
    samples = by_image(read(file, images or file.parent, report), report)
    return pack(samples, captioned, report, out, per_shard, val_fraction, overwrite)


def pack_coco(
    annotations: Path,
    images: Path,
    out: Path,
    per_shard: int = 1000,
    captions: Literal["first", "all"] = "all",
    val_fraction: float = 0.0,
    overwrite: bool = False,
) -> PackReport:
    """Pack a caption file in COCO's format and its folder of images into shards; keys are the images' ids.

    captions: 'all' packs each image with all its captions, 'first' with the first alone. Otherwise as pack_tsv does.

    Raises:
        UserError: the file is missing or of another format, and as pack_tsv does.
    """
    report = PackReport()
    names, texts = read_coco_captions(annotations, report.skip)
    rows = [
        Pair(str(key), text, images / names[key], {"source": names[key], "image_id": key})
        for key, said in texts.items()
        for text in (said if captions == "all" else said[:1])
    ]
    for key in (key for key, said in texts.items() if not said):
        report.skip(str(key), "image without caption")
    return pack(by_image(rows, report), captioned, report, out, per_shard, val_fraction, overwrite)


def pack(
    samples: list[Packed],
    members: Callable[[Packed, PackReport], dict[str, bytes]],
    report: PackReport,
    out: Path,
    per_shard: int,
    val_fraction: float,
    overwrite: bool,
) -> PackReport:
    """Write samples into shards, as pack_tsv says. members: a sample's files by extension; raises BrokenSample."""
    check_real("val_fraction", val_fraction, 0, 1)
    sets = {out: samples}
    if val_fraction:
        sets = split(sets[out], out, val_fraction)
    former = _former(out) - sets.keys() if overwrite else set()
    for folder in (*sets, *former):
        own_shards(folder) if overwrite else check_no_shards(folder)
    if overwrite:
        (out / REPORT).unlink(missing_ok=True)  # which says that all was packed
    for folder, samples in sets.items():
        report.folders[str(folder)] = write_members(_encoded(samples, members, report), folder, per_shard, overwrite)
    for folder in former:  # of another split: they would hold the same images once more
        with held(folder):
            remove_shards(folder)
    report.images = sum(report.folders.values())
    counts = {"images": report.images, "pairs": report.pairs, "folders": report.folders}
    write_json(out / REPORT, counts | {"skipped": report.skipped, "names": report.names})
    if empty := [folder for folder, count in report.folders.items() if not count]:
        causes = "; ".join(f"{cause}: {len(names)}, {first_few(names, few=SHOWN)}" for cause, names in report.names.items())
        told = f"{first_few(empty)}: no {report.unit} could be packed ({causes or 'the file holds no pair'})"
        raise UserError(f"{told}; correct the file, or name the folder of its images. {out / REPORT} has all names")
    return report


def _former(out: Path) -> set[Path]:
    """The folders of shards that the report of a former packing into this one names."""
    try:
        folders = read_json(out / REPORT, "a report of packing")["folders"]
    except (UserError, KeyError, TypeError):
        return set()
    return {folder for folder in (out, out / "train", out / "val") if str(folder) in folders and folder.is_dir()}


def is_packed(out: Path) -> bool:
    """Whether a folder was packed to the end, with an image on each side."""
    return (out / REPORT).exists() and all(read_json(out / REPORT, "a report of packing")["folders"].values())


def split(samples: list[Packed], out: Path, fraction: float) -> dict[Path, list[Packed]]:
    """Images for training and validation, by folder. Raises UserError where one side has none."""
    sets: dict[Path, list[Packed]] = {out / "train": [], out / "val": []}
    for sample in samples:
        name = os.path.normpath(sample.meta["source"]).encode("utf-8", "surrogatepass")
        place = int.from_bytes(blake2b(name, digest_size=8).digest(), "big") / 2**64  # 0 to 1, evenly
        sets[out / ("val" if place < fraction else "train")].append(sample)
    for folder, some in sets.items():
        if samples and not some:
            raise UserError(f"{folder}: none of {len(samples)} images falls there; change --val-fraction {fraction}")
    return sets


def captioned(sample: Captioned, report: PackReport) -> dict[str, bytes]:
    """The members of an image and its captions. Raises BrokenSample."""
    jpeg, first = as_jpeg(Path(sample.image)), sample.captions[0]
    report.pairs += len(sample.captions)
    return members_of(jpeg, first, {"key": sample.key, "caption": first, "captions": sample.captions, **sample.meta})


def _encoded(
    samples: list[Packed], members: Callable[[Packed, PackReport], dict[str, bytes]], report: PackReport
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for sample in tqdm(samples, desc="packing", unit=" images"):
        try:
            yield sample.key, members(sample, report)
        except BrokenSample as error:
            report.skip(f"{sample.key} {sample.image}", str(error))


def as_jpeg(path: Path) -> bytes:
    """An image file as a JPEG: its own bytes where it is one. Raises BrokenSample."""
    data = file_bytes(path)
    image = decode_image(data)
    if data.startswith(JPEG):
        return data
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
