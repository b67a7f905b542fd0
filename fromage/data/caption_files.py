"""Files of captions, as people write them: a TSV, JSON lines, a JSON object, or COCO's caption file.

The readers give pairs of a caption and an image, one by one; images are not opened. What is no pair is skipped and named.
"""

from __future__ import annotations

import json
import os
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fromage.data.annotation_formats import coco_captions, format_of
from fromage.data.annotations import FILE, TEXT, leave_out, problem, shown
from fromage.errors import UserError, reason
from fromage.io import decode_text, encoding_of, read_json

IMAGES, CAPTIONS = ("image", "file_name"), ("captions", "caption", "text")  # fields of JSON lines; the first that is there


class Pair(NamedTuple):
    """One caption of an image, before the image is read. meta holds the image's name in the file as 'source'."""

    key: str
    caption: str
    image: Path
    meta: dict[str, Any]


class Captioned(NamedTuple):
    """An image and all its captions; key and meta are those of its first pair."""

    key: str
    captions: list[str]
    image: str
    meta: dict[str, Any]


@dataclass
class Skipped:
    """Names of what a reader left out, lines or pairs, by cause."""

    names: dict[str, list[str]] = field(default_factory=dict)

    @property
    def skipped(self) -> dict[str, int]:
        """How many were left out, by cause."""
        return {cause: len(names) for cause, names in self.names.items()}

    def skip(self, name: str, why: str) -> None:
        """Record what is left out. why: 'cause' or 'cause: detail'."""
        cause, _, detail = why.partition(": ")
        self.names.setdefault(cause, []).append(f"{name} ({detail})" if detail else name)


def check_there(file: Path, wanted: str) -> None:
    """Raise UserError where a file is missing; wanted: what to name instead."""
    if not os.path.isfile(file):  # noqa: PTH113 (Path.is_file raises for a long name)
        raise UserError(f"{file} is missing: name {wanted}")


def tsv_pairs(tsv: Path, images: Path, skipped: Skipped) -> Iterator[Pair]:
    """The pairs of a TSV; images: folder that paths are relative to. Lines that are no pair go to skipped."""
    for number, line in _lines(tsv, skipped):
        caption, _, rest = line.partition("\t")
        image = rest.partition("\t")[0].strip()
        if image and "\0" not in image:
            yield Pair(f"{number:09d}", caption, images / image, {"source": image, "line": number})
        elif line.strip():
            skipped.skip(f"line {number}", "null byte in the image's name" if image else "no tab and image")


def _lines(path: Path, skipped: Skipped) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, from 1; a broken line of UTF-8 is skipped."""
    for number, line in enumerate(_raw_lines(path), 1):
        try:
            yield number, (line if isinstance(line, str) else line.decode("utf-8")).strip("\r\n")
        except UnicodeDecodeError:
            skipped.skip(f"line {number}", "not UTF-8")


def _raw_lines(path: Path) -> Iterator[str | bytes]:
    """The lines of a text file, as bytes where they are UTF-8. Raises UserError where it cannot be read."""
    try:
        with path.open("rb") as lines:
            encoding = encoding_of(lines.peek(64), path)
            if encoding == "utf-16":
                yield from decode_text(lines.read(), path).split("\n")
            elif encoding == "utf-8-sig":
                lines.read(len(BOM_UTF8))
            yield from lines
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); name another file") from error


def jsonl_pairs(jsonl: Path, images: Path, skipped: Skipped) -> Iterator[Pair]:
    """The pairs of JSON lines, as tsv_pairs gives them."""
    for number, fields in json_lines(jsonl, skipped):
        image, said = (next((fields[name] for name in names if name in fields), None) for names in (IMAGES, CAPTIONS))
        texts: Any = [said] if isinstance(said, str) else said
        if isinstance(image, str) and not problem(image, FILE) and not problem(texts, [TEXT]):
            meta = {"source": image, "line": number}
            yield from (Pair(f"{number:09d}", text, images / image, meta) for text in texts)
        else:
            skipped.skip(f"line {number}", "no image and captions")


def json_lines(path: Path, skipped: Skipped) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of JSON of a file with their numbers, from 1; empty where one is no object. Blank lines are left out."""
    for number, line in _lines(path, skipped):
        try:
            entry = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            skipped.skip(f"line {number}", "no JSON")
            continue
        if line.strip():
            yield number, entry if isinstance(entry, dict) else {}


Reader = Callable[[Path, Path, Skipped], Iterator[Pair]]  # file, folder that its paths are relative to -> its pairs
READERS: dict[str, Reader] = {".tsv": tsv_pairs, ".jsonl": jsonl_pairs}  # by suffix


def by_image(rows: Iterable[Pair], skipped: Skipped) -> list[Captioned]:
    """Pairs grouped by the path of their image, in the order of their first ones; without empty captions.

    All of them are in memory, about 0.9 GB for a million images with a caption of ten words each.
    """
    groups: dict[str, Captioned] = {}
    for row in rows:
        if not (caption := row.caption.strip()):
            skipped.skip(f"{row.key} {row.image}", "empty caption")
            continue
        same = os.path.normpath(row.image)
        if same not in groups:
            groups[same] = Captioned(row.key, [], str(row.image), row.meta)
        groups[same].captions.append(caption)
    return list(groups.values())


def read_captions(path: Path, folder: Path) -> dict[str, str]:
    """File -> first caption, names relative to folder.

    From a TSV or JSON lines as they are packed, from {"a.jpg": "text" or ["text", ...]}, or from COCO's caption JSON.
    """
    if (read := READERS.get(path.suffix.lower())) and path.is_file():
        skipped = Skipped()
        rows = by_image(read(path, folder, skipped), skipped)
        lost = [f"{name}: {cause}" for cause, names in skipped.names.items() for name in names]
        leave_out(path, lost, len(lost) + sum(len(row.captions) for row in rows))
        return {os.path.normpath(row.image): row.captions[0] for row in rows}
    remedy = "a .tsv or .jsonl of captions, {file: caption} as JSON, or COCO's caption file"
    data = read_json(path, remedy)
    if format_of(data) == "captions of COCO":
        files, captions = coco_captions(path, data)
        return {str(folder / files[key]): texts[0].strip() for key, texts in captions.items() if texts}
    if not isinstance(data, dict):
        raise UserError(f"{path}: is {shown(data)}, not an object; name {remedy}")
    said = {name: texts if isinstance(texts, list) and texts else [texts] for name, texts in data.items()}
    odd = {name: cause for name, texts in said.items() if (cause := problem(name, FILE) or problem(texts[0], TEXT))}
    leave_out(path, [f"the caption of {ascii(name)[:60]}{cause}" for name, cause in odd.items()], len(said))
    return {str(folder / name): texts[0].strip() for name, texts in said.items() if name not in odd}
