"""Annotation files as their publishers give them: read, and recognised by what their first entries hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fromage.errors import UserError

# Kind of a file -> test of its content; the first that fits counts.
KINDS: dict[str, Callable[[Any], bool]] = {
    "captions of COCO": lambda c: "caption" in c["annotations"][0] and "file_name" in c["images"][0],
    "boxes of COCO": lambda c: "bbox" in c["annotations"][0],
    "Karpathy's split of COCO": lambda c: c["dataset"] == "coco" and "sentences" in c["images"][0],
    "Karpathy's split of Flickr30k": lambda c: c["dataset"] == "flickr30k" and "sentences" in c["images"][0],
    "Karpathy's split of another data set": lambda c: "sentences" in c["images"][0] and bool(c["dataset"]),
    "stories in sequence of VIST": lambda c: "worker_arranged_photo_order" in c["annotations"][0][0],
    "descriptions in isolation of VIST": lambda c: "photo_flickr_id" in c["annotations"][0][0],
    "dialogues of VisDial 1.0 with candidates": lambda c: _is_visdial(c, "1.0") and "gt_index" in _last_round(c),
    "dialogues of VisDial 1.0 without candidates": lambda c: _is_visdial(c, "1.0"),
    "dialogues of another version of VisDial": lambda c: "dialogs" in c["data"],
    "instructions of LLaVA": lambda c: "from" in c[0]["conversations"][0],
    "dense annotations of VisDial 1.0": lambda c: "gt_relevance" in c[0],
}


def _is_visdial(content: Any, version: str) -> bool:
    return content["version"] == version and "questions" in content["data"]


def _last_round(content: Any) -> dict[str, Any]:
    return content["data"]["dialogs"][0]["dialog"][-1]


def kind_of(content: Any) -> str:
    """The kind of an annotation file by its content, one of KINDS or 'of no known kind'."""
    for kind, fits in KINDS.items():
        try:
            if fits(content):
                return kind
        except (KeyError, IndexError, TypeError):
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
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path}: no JSON, or broken ({error}); name {remedy}") from error
    if (kind := kind_of(content)) not in wanted:
        raise UserError(f"{path}: is {kind}, and not {' or '.join(wanted)}; name {remedy}")
    return kind, content


def malformed(path: Path, error: Exception) -> UserError:
    """The error for a file whose later entries are not like its first ones."""
    return UserError(f"{path}: an entry is broken ({error!r}); fetch the file anew")


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Turn what odd entries of a file raise into UserError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise malformed(path, error) from error
