"""Questions about images in LLaVA's files for its evaluations: VQAv2, OK-VQA, GQA, VizWiz, ScienceQA and others.

Lines of JSON {question_id, image, text}; or ScienceQA's JSON list of {id, image, conversations}, where the first turn asks.
Both may lack the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from fromage.data.annotations import FILE, ID, TEXT, Schema, leave_out, optional, problem
from fromage.errors import UserError
from fromage.io import parse_json, read_text

LINE: Schema = {"question_id": ID, "image": optional(FILE), "text": TEXT}
ENTRY: Schema = {"id": ID, "image": optional(FILE), "conversations": [{"value": TEXT}]}
WANTED = "lines of JSON {question_id, image, text}, as LLaVA's evaluations have them"


class Question(NamedTuple):
    """A question: its id, the path of its image (None: without), and its text as it stands in the file."""

    key: int | str
    image: Path | None
    text: str

    @property
    def asked(self) -> str:
        """The text alone: where the image stands, the model's own prompt says."""
        return self.text.replace("<image>", "").strip()


@dataclass(frozen=True)
class Questions:
    """A file of questions; odd: how many entries were left out."""

    file: Path
    questions: list[Question]
    odd: int


def read_questions(file: Path, images: Path, limit: int | None = None) -> Questions:
    """The first `limit` questions of a file. Raises UserError for another format, and for an id that is there twice."""
    text = read_text(file, WANTED)
    odd: list[str] = []
    entries = _entries(file, text, odd)
    found = [_question(entry, images) for entry in islice(entries, limit)]
    leave_out(file, odd, len(found) + len(odd))
    if not found:
        raise UserError(f"{file}: holds no question; name {WANTED}")
    seen: set[int | str] = set()
    for question in found:
        if question.key in seen:
            raise UserError(
                f"{file}: the question {question.key!r} is there twice, and answers are told apart by it; correct it"
            )
        seen.add(question.key)
    return Questions(file, found, len(odd))


def _entries(file: Path, text: str, odd: list[str]) -> Iterator[dict[str, Any]]:
    """Entries that are as they ought to be; what is odd about the others is added to `odd`."""
    for where, entry, wrong in _listed(file, text) if text.lstrip().startswith("[") else _lines(text):
        if not wrong and not _question(entry, Path()).asked:
            wrong = " asks nothing"
        if wrong:
            odd.append(where + wrong)
        else:
            yield entry


def _listed(file: Path, text: str) -> Iterator[tuple[str, Any, str]]:
    """Where an entry stands, the entry, and what is odd about it, of a JSON list."""
    for number, entry in enumerate(parse_json(text, file, WANTED)):
        yield f"entry [{number}]", entry, problem(entry, ENTRY)


def _lines(text: str) -> Iterator[tuple[str, Any, str]]:
    """The same of lines of JSON."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                entry = parse_json(line, "", "")
            except UserError as error:
                yield f"line {number}", None, " " + str(error).strip(": ").partition(";")[0]
            else:
                yield f"line {number}", entry, problem(entry, LINE)


def _question(entry: dict[str, Any], images: Path) -> Question:
    image = images / entry["image"] if entry.get("image") else None
    if "conversations" in entry:
        said = entry["conversations"]
        return Question(entry["id"], image, said[0]["value"] if said else "")
    return Question(entry["question_id"], image, entry["text"])
