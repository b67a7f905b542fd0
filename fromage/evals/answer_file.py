"""A file of answers for official scorers, written by a run that may be killed: the next one goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Self

from fromage.data.annotations import ID, TEXT, Schema, problem
from fromage.errors import UserError
from fromage.io import WholeFile, check_new, parse_json, writing
from fromage.locks import held

RECORD: Schema = {"question_id": ID, "text": TEXT}
KEPT = "the answers that are there are kept, and the same command goes on, without --overwrite"


class AnswerFile:
    """FILE, lines of JSON in the order of their questions; FILE.part has those that are there while a run goes on.

    The first line of FILE.part says what it belongs to; while there is one, a FILE beside it is to be replaced.
    Used as a context, which keeps other processes away.

    Attributes:
        answered: the answers that are there, by question_id.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], overwrite: bool = False) -> None:
        """about: what the answers belong to. overwrite: begin again, and replace FILE."""
        self.path, self.about, self.overwrite = path, dict(about), overwrite
        self.part = path.with_name(f"{path.name}.part")
        self.answered: dict[int | str, dict[str, Any]] = {}
        self._stack = ExitStack()
        self._file: IO[bytes]

    def __enter__(self) -> Self:
        """Raises UserError where FILE is there, or FILE.part of another run, and where another process writes it."""
        with self._stack:
            if not self.part.exists():
                check_new(self.path, self.overwrite)
            self._stack.enter_context(held(self.path, beside=True))
            with writing(self.part):
                good = 0 if self.overwrite else self._read()
                check_new(self.path, self.overwrite or good > 0)
                self._file = self._stack.enter_context(self.part.open("ab"))
                self._file.truncate(good)
                if not good:
                    self._write([{"about": self.about}])
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with self._stack, suppress(OSError):
            if not self.answered:
                self.part.unlink()  # a run that failed before its first answer stands in nobody's way

    def _read(self) -> int:
        """Take up the answers of FILE.part; returns how many bytes of it are whole lines of this run."""
        if not self.part.exists():
            return 0
        first, *lines = self.part.read_bytes().splitlines(keepends=True) or [b""]
        there = _parsed(first)
        there = there.get("about") if isinstance(there, dict) else None
        if there != self.about and first.endswith(b"\n"):
            raise self._of_another(there)
        if there != self.about:
            return 0  # killed at its first line
        good = len(first)
        for line in lines:
            record: Any = _parsed(line) if line.endswith(b"\n") else None
            if problem(record, RECORD):
                break
            self.answered[record["question_id"]] = record
            good += len(line)
        return good

    def _of_another(self, there: Any) -> UserError:
        if not isinstance(there, dict):
            return UserError(
                f"{self.part}: is no file of answers that a run was writing; move it, or replace it: --overwrite"
            )
        key = next(key for key in {**self.about, **there} if there.get(key) != self.about.get(key))
        differs = f"{key} {there.get(key)!r} there, {self.about.get(key)!r} here"
        remedy = "go on as it was begun, name another file, or begin again: --overwrite"
        return UserError(f"{self.part}: answers of another run ({differs}); {remedy}")

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Keep answers, each with its question_id. Raises UserError where the disk does not take them."""
        self._write(records)
        self.answered |= {record["question_id"]: record for record in records}

    def _write(self, records: Iterable[Mapping[str, Any]]) -> None:
        with writing(self.part, KEPT):
            self._file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
            self._file.flush()

    def finish(self, order: Iterable[int | str]) -> None:
        """Write FILE, whole, in the order of these question_ids, and remove FILE.part."""
        lines = (json.dumps(self.answered[key]) + "\n" for key in order if key in self.answered)
        with WholeFile(self.path, kept=KEPT) as part:
            part.write_text("".join(lines), "utf-8")
        self.part.unlink()


def _parsed(line: bytes) -> Any:
    try:
        return parse_json(line.decode(), "", "")
    except (UserError, UnicodeDecodeError):
        return None
