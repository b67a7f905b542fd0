"""Annotation files as their publishers give them: read, recognised by what their first entries hold, and checked.

A format is a value of `Wanted`: {"image_id": ID, "caption": TEXT} is a mapping that holds both, [NUMBER] a list of numbers,
(NUMBER,) * 4 a list of four. Each published format is checked once, where it is read, by `fitting`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from fromage.checks import HALVES
from fromage.errors import UserError
from fromage.io import read_json

LARGE = 2**63  # of whole numbers, as in databases
MAX_ODD = 0.05  # share of a file's entries that may be odd, where nothing else is said by odd_allowed


@dataclass
class OddAllowed:
    """share: of a file's entries that may be odd, 0 to 1. count: of those that were left out so far."""

    share: float
    count: int = 0


_allowed: ContextVar[OddAllowed | None] = ContextVar("odd entries", default=None)


@contextmanager
def odd_allowed(share: float) -> Iterator[OddAllowed]:
    """In this context a share (0 to 1) of a file's entries may be odd: --max-lost, which the user gave."""
    allowed = OddAllowed(share)
    before = _allowed.set(allowed)
    try:
        yield allowed
    finally:
        _allowed.reset(before)


class Kind(NamedTuple):
    """What a field may be: its name for messages, and a test."""

    name: str
    fits: Callable[[Any], bool]


Wanted: TypeAlias = "Kind | Mapping[str, Wanted] | Sequence[Wanted]"
Skip = Callable[[str, str], None]  # is told the name of an odd entry, and 'cause: detail'


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not HALVES.search(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGE


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and isfinite(value))


def _is_file(value: Any) -> bool:
    """Whether a disk takes it: no null byte, and no part that is too long."""
    fits = _is_text(value) and bool(value) and "\0" not in value
    return fits and len(value) <= 1024 and all(len(part.encode()) < 256 for part in value.split("/"))


TEXT = Kind("a text", _is_text)
FILE = Kind("a file name", _is_file)
WHOLE = Kind("a whole number", _is_whole)
DIGITS = Kind(
    "a whole number", lambda value: _is_whole(value) or (isinstance(value, str) and value.isdecimal() and len(value) < 19)
)
NUMBER = Kind("a number", _is_number)
ID = Kind("a number or text", lambda value: _is_whole(value) or _is_text(value))


def optional(kind: Kind) -> Kind:
    """The same, or null; a mapping may lack it."""
    return Kind(kind.name, lambda value: value is None or kind.fits(value))


def below(count: int) -> Kind:
    """A whole number from 0 to count - 1."""
    return Kind(f"a whole number below {count}", lambda value: _is_whole(value) and 0 <= value < count)


def problem(value: Any, wanted: Wanted) -> str:
    """What is odd about a value, to stand after its name: '.caption is null, not a text'; '' where nothing is."""
    if isinstance(wanted, Kind):
        return "" if wanted.fits(value) else f" is {shown(value)}, not {wanted.name}"
    if not isinstance(wanted, Mapping):
        if not isinstance(value, list):
            return f" is {shown(value)}, not a list"
        if isinstance(wanted, tuple) and len(value) != len(wanted):
            return f" is a list of {len(value)}, not of {len(wanted)}"
        return next((f"[{i}]{odd}" for i, item in enumerate(value) if (odd := problem(item, wanted[0]))), "")
    if not isinstance(value, dict):
        return f" is {shown(value)}, not an object with {', '.join(wanted)}"
    for name, kind in wanted.items():
        if name not in value and not (isinstance(kind, Kind) and kind.fits(None)):
            return f" lacks {name}"
        if odd := problem(value.get(name), kind):
            return f".{name}{odd}"
    return ""


def shown(value: Any) -> str:
    """A value of JSON in a message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return "a text with half a character" if HALVES.search(value) else f"the text {value[:40]!r}"
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'}{'' if value else ' of nothing'}"
    return "a number that is too large" if isinstance(value, int) and abs(value) >= LARGE else str(value)[:40]


def fitting(path: Path, name: str, entries: Any, wanted: Wanted, skip: Skip | None = None) -> list[Any]:
    """The entries of a list, called name, that are as its format has them.

    skip is told of each of the others. Without it they are warned of, and too many of them refuse the file (odd_allowed).
    Raises UserError for those, and where there is no list.
    """
    if not isinstance(entries, list):
        raise UserError(f"{path}: {name} is {shown(entries)}, not a list; fetch the file again")
    odd = {number: cause for number, entry in enumerate(entries) if (cause := problem(entry, wanted))}
    leave_out(path, [f"{name}[{number}]{cause}" for number, cause in odd.items()], len(entries), skip)
    return [entry for number, entry in enumerate(entries) if number not in odd]


def by_id(path: Path, name: str, entries: list[dict[str, Any]], skip: Skip | None = None) -> dict[Any, dict[str, Any]]:
    """Entries, called name, by their `id`. Those that share one are odd, all of them, since nobody knows which is meant.

    So files that were put together are refused where their ids are not apart. skip: as of fitting, which also says what is
    raised.
    """
    found: dict[Any, dict[str, Any]] = {}
    twice: dict[Any, dict[str, Any]] = {}
    for entry in entries:
        if found.setdefault(entry["id"], entry) != entry:
            twice[entry["id"]] = entry
    leave_out(path, [f"{name} of the id {shown(key)}, which several have" for key in twice], len(entries), skip)
    return {key: entry for key, entry in found.items() if key not in twice}


def leave_out(path: Path, odd: list[str], count: int, skip: Skip | None = None) -> None:
    """Tell of odd entries, as fitting does; count: of all entries."""
    if skip:
        for name, _, why in (cause.partition(" ") for cause in odd):
            skip(name, f"odd entry: {why}")
        return
    told = f"{path}: {len(odd)} of {count} entries are odd ({odd[0]})" if odd else ""
    allowed = _allowed.get()
    if len(odd) > (MAX_ODD if allowed is None else allowed.share) * count:
        more = "" if allowed is None else ", or allow more by --max-lost (data.max_lost in training)"
        raise UserError(f"{told}; fetch the file again, or correct it{more}")
    if odd:
        warnings.warn(f"{told} and left out", stacklevel=3)
    if allowed is not None:
        allowed.count += len(odd)


FIRST = 20  # entries by which a file is recognised: the very first one may be odd


def _objects(entries: Any) -> list[dict[str, Any]]:
    """Those of the first entries that are objects."""
    return [entry for entry in entries[:FIRST] if isinstance(entry, dict)] if isinstance(entries, list) else []


def _some(entries: Any, field: str) -> bool:
    """Whether one of the first entries has a field; an entry may also be a list of objects."""
    inner = [entry for some in entries[:FIRST] for entry in _objects(some)] if isinstance(entries, list) else []
    return any(field in entry for entry in (*_objects(entries), *inner))


# Kind of a file -> test of its content; the first that fits counts.
KINDS: dict[str, Callable[[Any], bool]] = {
    "captions of COCO": lambda c: _some(c["annotations"], "caption") and _some(c["images"], "file_name"),
    "boxes of COCO": lambda c: _some(c["annotations"], "bbox"),
    "Karpathy's split of COCO": lambda c: c["dataset"] == "coco" and _some(c["images"], "sentences"),
    "Karpathy's split of Flickr30k": lambda c: c["dataset"] == "flickr30k" and _some(c["images"], "sentences"),
    "Karpathy's split of another data set": lambda c: _some(c["images"], "sentences") and bool(c["dataset"]),
    "stories in sequence of VIST": lambda c: _some(c["annotations"], "worker_arranged_photo_order"),
    "descriptions in isolation of VIST": lambda c: _some(c["annotations"], "photo_flickr_id"),
    "dialogues of VisDial 1.0 with candidates": lambda c: _is_visdial(c, "1.0") and _in_dialogues(c, "gt_index"),
    "dialogues of VisDial 1.0 without candidates": lambda c: _is_visdial(c, "1.0"),
    "dialogues of another version of VisDial": lambda c: "dialogs" in c["data"],
    "instructions of LLaVA": lambda c: any(_some(entry.get("conversations"), "from") for entry in _objects(c)),
    "dense annotations of VisDial 1.0": lambda c: _some(c, "gt_relevance"),
    "regions of Visual Genome": lambda c: _some(c, "regions"),
    "objects of Visual Genome": lambda c: _some(c, "objects"),
    "images of Visual Genome": lambda c: _some(c, "url") and _some(c, "coco_id"),
    "images of COCO": lambda c: not isinstance(c, list) and _some(c["images"], "file_name") and "annotations" not in c,
    "composed queries of CIRCO": lambda c: _some(c, "relative_caption"),
    "composed queries of CIRR": lambda c: _some(c, "pairid"),
    "an image split of CIRR": lambda c: isinstance(c, dict) and _are_names(list(c.values())),
    "captions of FashionIQ": lambda c: _some(c, "candidate") and _some(c, "captions"),
    "templates of GeneCIS": lambda c: _some(c, "condition") and _some(c, "gallery"),
    "dialogues of ChatIR": lambda c: _some(c, "img") and _some(c, "dialog"),
    "a list of images": lambda c: isinstance(c, list) and _are_names(c),
}


def _are_names(values: list[Any]) -> bool:
    return bool(values) and all(map(_is_file, values[:FIRST]))


def _is_visdial(content: Any, version: str) -> bool:
    return content["version"] == version and "questions" in content["data"]


def _in_dialogues(content: Any, field: str) -> bool:
    return any(_some(dialogue.get("dialog"), field) for dialogue in _objects(content["data"]["dialogs"]))


def kind_of(content: Any) -> str:
    """The kind of an annotation file by its content, one of KINDS or 'of no known kind'."""
    for kind, fits in KINDS.items():
        try:
            if fits(content):
                return kind
        except (KeyError, TypeError):
            continue
    return "of no known kind"


def read_annotations(path: Path, wanted: tuple[str, ...], remedy: str) -> tuple[str, Any]:
    """The kind of an annotation file, and its content.

    Args:
        path: a JSON file.
        wanted: kinds that are accepted, of KINDS.
        remedy: names of files that would be accepted, for the error.

    Raises:
        UserError: the file is missing, is no JSON, or is of another kind.
    """
    content = read_json(path, remedy)
    if (kind := kind_of(content)) not in wanted:
        raise UserError(f"{path}: is {kind}, and not {' or '.join(wanted)}; name {remedy}")
    return kind, content


class CaptionedImages(NamedTuple):
    """What a caption file in COCO's format says. files: image id -> file name; captions: image id -> texts."""

    files: dict[Any, str]
    captions: dict[Any, list[str]]


def coco_captions(path: Path, content: Any, skip: Skip | None = None) -> CaptionedImages:
    """The content of a caption file in COCO's format, checked; skip: as of fitting."""
    images = fitting(path, "images", content["images"], {"id": ID, "file_name": FILE}, skip)
    notes = fitting(path, "annotations", content["annotations"], {"image_id": ID, "caption": TEXT}, skip)
    files = {key: image["file_name"] for key, image in by_id(path, "images", images, skip).items()}
    captions: dict[Any, list[str]] = {key: [] for key in files}
    strays = [
        f"annotations of image {shown(note['image_id'])}, which is missing"
        for note in notes
        if note["image_id"] not in files
    ]
    leave_out(path, strays, len(notes), skip)
    for note in notes:
        if note["image_id"] in files:
            captions[note["image_id"]].append(note["caption"])
    return CaptionedImages(files, captions)
