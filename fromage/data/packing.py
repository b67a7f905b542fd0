"""Packing image files and captions (a TSV, or COCO's caption file) into webdataset shards."""

from __future__ import annotations

import io
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from fromage.data.annotations import coco_captions, read_annotations
from fromage.data.shards import write_shards
from fromage.errors import BrokenSample, UserError
from fromage.images.codec import decode_image
from fromage.io import decode_text, encoding_of, write_json

JPEG = b"\xff\xd8\xff"  # first bytes of a JPEG file


class Pair(NamedTuple):
    """One pair before its image is read."""

    key: str
    caption: str
    image: Path
    meta: dict[str, Any]


@dataclass
class PackReport:
    """Result of packing: the number of pairs packed, and the names of skipped pairs by cause."""

    pairs: int = 0
    names: dict[str, list[str]] = field(default_factory=dict)

    @property
    def skipped(self) -> dict[str, int]:
        """How many pairs were skipped, by cause."""
        return {cause: len(names) for cause, names in self.names.items()}

    def skip(self, name: str, why: str) -> None:
        """Record a skipped pair. why: 'cause' or 'cause: detail'."""
        cause, _, detail = why.partition(": ")
        self.names.setdefault(cause, []).append(f"{name} ({detail})" if detail else name)


def pack_tsv(tsv: Path, out: Path, images: Path | None = None, per_shard: int = 1000) -> PackReport:
    """Pack a TSV of caption<TAB>image path, one pair per line, into shards; the key of a pair is its line number.

    Paths are relative to `images`, by default the TSV's folder. JPEG files are copied unchanged, other images are
    converted to JPEG. Pairs that cannot be used are skipped and listed in report.json beside the shards.

    Raises:
        UserError: the TSV is missing, out already contains shards, or no pair could be packed.
    """
    report = PackReport()
    if not tsv.is_file():
        raise UserError(f"{tsv} is missing: name a file with a caption, a tab and an image's path on each line")
    return _pack(_tsv_rows(tsv, images or tsv.parent, report), report, out, per_shard)


def _tsv_rows(tsv: Path, images: Path, report: PackReport) -> Iterator[Pair]:
    for number, line in enumerate(_lines(tsv), 1):
        try:
            caption, _, rest = (line if isinstance(line, str) else line.decode()).strip("\r\n").partition("\t")
        except UnicodeDecodeError:
            report.skip(f"line {number}", "not UTF-8")
            continue
        image = rest.partition("\t")[0].strip()
        if image and "\0" not in image:
            yield Pair(f"{number:09d}", caption, images / image, {"source": image, "line": number})
        elif line.strip():
            report.skip(f"line {number}", "null byte in the image's name" if image else "no tab and image")


def _lines(tsv: Path) -> Iterator[str | bytes]:
    """The lines of a text file; bytes where it is UTF-8, of which a line may be broken."""
    with tsv.open("rb") as lines:
        encoding = encoding_of(lines.peek(64), tsv)
        if encoding == "utf-16":
            yield from decode_text(lines.read(), tsv).splitlines()
        elif encoding == "utf-8-sig":
            lines.read(len(BOM_UTF8))
        yield from lines


def pack_coco(
    annotations: Path, images: Path, out: Path, per_shard: int = 1000, captions: Literal["first", "all"] = "all"
) -> PackReport:
    """Pack a caption file in COCO's format and its folder of images into shards.

    captions: 'all' makes one pair per caption, with keys IMAGEID_0, IMAGEID_1 ...; 'first' one pair per image, IMAGEID_0.
    Images are converted as in pack_tsv.

    Raises:
        UserError: the file is missing or of another format, out holds shards already, or no pair could be packed.
    """
    report = PackReport()
    _, content = read_annotations(annotations, ("captions of COCO",), "COCO's caption file, as captions_train2017.json")
    names, texts = coco_captions(annotations, content, report.skip)
    rows = [
        Pair(f"{key}_{i}", text, images / names[key], {"source": names[key], "image_id": key})
        for key, said in texts.items()
        for i, text in enumerate(said if captions == "all" else said[:1])
    ]
    for key in (key for key, said in texts.items() if not said):
        report.skip(str(key), "image without caption")
    return _pack(rows, report, out, per_shard)


def _pack(rows: Iterable[Pair], report: PackReport, out: Path, per_shard: int) -> PackReport:
    report.pairs = write_shards(_pairs(rows, report), out, per_shard)
    write_json(out / "report.json", {"pairs": report.pairs, "skipped": report.skipped, "names": report.names})
    if not report.pairs:
        causes = ", ".join(f"{cause}: {count}" for cause, count in report.skipped.items()) or "it holds no pair"
        raise UserError(f"no pair could be packed ({causes}): see {out / 'report.json'} for the names")
    return report


def _pairs(rows: Iterable[Pair], report: PackReport) -> Iterator[tuple[str, bytes, str, dict[str, Any]]]:
    as_jpeg = lru_cache(maxsize=1)(_as_jpeg)  # consecutive captions can have the same image
    for row in tqdm(rows, desc="packing", unit=" pairs"):
        caption = row.caption.strip()
        try:
            if not caption:
                raise BrokenSample("empty caption")
            jpeg = as_jpeg(row.image)
        except BrokenSample as error:
            report.skip(f"{row.key} {row.image}", str(error))
            continue
        yield row.key, jpeg, caption, {"key": row.key, "caption": caption, **row.meta}


def _as_jpeg(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BrokenSample(f"missing image: {error.strerror}") from None
    image = decode_image(data)
    if data.startswith(JPEG):
        return data
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
