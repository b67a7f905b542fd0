"""POPE (Li et al., EMNLP 2023), and other yes-or-no questions in its format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fromage.data.annotations import FILE, ID, TEXT, Schema, optional, problem
from fromage.errors import BrokenSample, UserError
from fromage.io import parse_json, read_text
from fromage.octopus.examples import Example
from fromage.octopus.sources.file_source import FileSource

QUESTION: Schema = {"question_id": ID, "image": FILE, "text": TEXT, "label": TEXT, "category": optional(TEXT)}


class Pope(FileSource):
    """POPE: yes-or-no questions whether an object is in an image; its three splits are three files.

    Attributes:
        kinds: after reading, the kind of each question by the key of its example: its `category`, as LLaVA's copies of the
            files have one, or else the file's name without its ending.
    """

    def __init__(self, file: str, images: str, *, limit: int | None = None) -> None:
        """Set the files; nothing is read yet.

        Args:
            file: lines of JSON {question_id, image, text, label}, and category where there are several kinds:
                coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json or the like.
            images: folder of the images.
            limit: maximum number of examples, the first ones; null for all.
        """
        super().__init__(Path(file), limit)
        self.images = Path(images)
        self.kinds: dict[str, str] = {}

    def read(self) -> Iterator[Example]:
        """One example per line."""
        wanted = "coco_pope_random.json or another of POPE's"
        self.kinds, known = {}, dict[str, Any]()
        for number, line in enumerate(read_text(self.file, wanted).split("\n"), 1):
            if not line.strip():
                continue
            self.seen += 1
            try:
                row = _question(line)
            except BrokenSample as error:
                self.odd.append(f"line {number}{error}")
            else:
                key, label = str(row["question_id"]), row["label"].strip().lower()
                if known.setdefault(key, row) != row:  # as in files put together
                    self.odd.append(f"line {number} has the question_id {key[:20]}, which another has")
                    continue
                self.kinds[key] = row.get("category") or self.file.stem
                yield Example(key, str(self.images / row["image"]), row["text"].strip(), (label,))


def _question(line: str) -> dict[str, Any]:
    """What a line of POPE holds. Raises BrokenSample where it is odd."""
    try:
        row = parse_json(line, "", "")
    except UserError as error:
        raise BrokenSample(str(error).strip(":").partition(";")[0]) from None
    if wrong := problem(row, QUESTION):
        raise BrokenSample(wrong)
    if row["label"].strip().lower() not in ("yes", "no"):
        raise BrokenSample(f" has the label {row['label'][:20]}, not yes or no")
    return row  # type: ignore[no-any-return]
