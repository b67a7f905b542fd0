"""Annotation files as their publishers give them: recognised by what their first entries hold, and read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fromage.data.annotations import FILE, ID, TEXT, Skip, by_id, fitting, leave_out, shown
from fromage.errors import UserError
from fromage.io import read_json

FIRST = 20  # entries by which a file is recognised: the very first one may be odd


def _objects(entries: Any) -> list[dict[str, Any]]:
    """Those of the first entries that are objects."""
    return [entry for entry in entries[:FIRST] if isinstance(entry, dict)] if isinstance(entries, list) else []


def _some(entries: Any, field: str) -> bool:
    """Whether one of the first entries has a field; an entry may also be a list of objects."""
    inner = [entry for some in entries[:FIRST] for entry in _objects(some)] if isinstance(entries, list) else []
    return any(field in entry for entry in (*_objects(entries), *inner))


# Format of a file -> test of its content; the first that fits counts.
FILE_FORMATS: dict[str, Callable[[Any], bool]] = {
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
    return bool(values) and all(map(FILE.fits, values[:FIRST]))


def _is_visdial(content: Any, version: str) -> bool:
    return content["version"] == version and "questions" in content["data"]


def _in_dialogues(content: Any, field: str) -> bool:
    return any(_some(dialogue.get("dialog"), field) for dialogue in _objects(content["data"]["dialogs"]))


def format_of(content: Any) -> str:
    """The format of an annotation file by its content, one of FILE_FORMATS or 'of no known kind'."""
    for name, fits in FILE_FORMATS.items():
        try:
            if fits(content):
                return name
        except (KeyError, TypeError):
            continue
    return "of no known kind"


def read_annotations(path: Path, wanted: tuple[str, ...], remedy: str) -> tuple[str, Any]:
    """The format of an annotation file, and its content.

    Args:
        path: a JSON file.
        wanted: formats that are accepted, of FILE_FORMATS.
        remedy: names of files that would be accepted, for the error.

    Raises:
        UserError: the file is missing, is no JSON, or is of another format.
    """
    content = read_json(path, remedy)
    if (found := format_of(content)) not in wanted:
        raise UserError(f"{path}: is {found}, and not {' or '.join(wanted)}; name {remedy}")
    return found, content


class CaptionedImages(NamedTuple):
    """What a caption file in COCO's format says. files: image id -> file name; captions: image id -> texts."""

    files: dict[Any, str]
    captions: dict[Any, list[str]]


def read_coco_captions(path: Path, skip: Skip | None = None) -> CaptionedImages:
    """A caption file in COCO's format, read. Raises UserError as read_annotations and coco_captions do."""
    _, content = read_annotations(path, ("captions of COCO",), "COCO's caption file, as captions_train2017.json")
    return coco_captions(path, content, skip)


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
