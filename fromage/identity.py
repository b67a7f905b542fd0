"""Folders that belong to one thing, as stored features to their tower: what they belong to, and refusing another's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fromage.errors import UserError, reason
from fromage.io import as_json, digest_of, parse_json, write_files
from fromage.locks import LOCK

OWN = {"format", "version"}  # keys that say what the file is, not what the folder belongs to


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that says in a JSON file what its content belongs to.

    Attributes:
        file: name of the JSON file.
        holds: what such a folder holds, for messages.
        of: what that belongs to, for messages.
        remedy: what to do about a folder that belongs to another, for messages.
        again: how to make such a folder, for messages.
        format: what the file says it is, its name and version; None where it says neither.
        reads: former versions that are read too.
        keys: what the file must say beside these.
        ignored: keys that two folders of the same thing may differ in.
        foreign: pattern of the files that a folder without the JSON file must not hold.
    """

    file: str
    holds: str
    of: str = ""
    remedy: str = "name another folder, or remove it"
    again: str = "remove it and make it again"
    format: tuple[str, int] | None = None
    reads: frozenset[int] = frozenset()
    keys: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    foreign: str = "*"

    def read(self, folder: Path) -> dict[str, Any]:
        """What the file says. Raises UserError where it is missing, damaged or of another format or version."""
        try:
            text = (folder / self.file).read_text(encoding="utf-8")
            about = parse_json(text, "", "")
        except UserError as error:
            raise self.unreadable(folder, str(error).strip(": ").partition(";")[0]) from error
        except (OSError, UnicodeDecodeError) as error:
            raise self.unreadable(folder, reason(error)) from error
        if not isinstance(about, dict):
            raise self.unreadable(folder, "not a JSON object")
        if self.format and (about.get("format"), about.get("version")) not in self._versions():
            raise self.unreadable(folder, "of another format or version")
        if missing := sorted(self.keys - about.keys()):
            raise self.unreadable(folder, f"no {missing[0]!r}")
        return about

    def _versions(self) -> list[tuple[str, int]]:
        """Formats and versions that are read."""
        return (
            [(name, version) for name, newest in [self.format] for version in (newest, *self.reads)] if self.format else []
        )

    def require(self, folder: Path, about: dict[str, Any]) -> dict[str, Any]:
        """What the file says. Raises UserError, beside that of read, where it belongs to another than `about`."""
        return self.compare(folder, self.read(folder), about)

    def compare(self, folder: str | Path, there: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
        """What the file of a folder, which may be a URL, says: `there`. Raises UserError where that is of another."""
        ignored = self.ignored | (OWN if self.format else set())
        for key in [key for key in (*about, *sorted(there.keys() - about.keys())) if key not in ignored]:
            if there.get(key) != about.get(key):
                differs = f"{key} {there.get(key)!r} there, {about.get(key)!r} here"
                raise UserError(f"{folder}: holds {self.holds} of another {self.of} ({differs}); {self.remedy}")
        return there

    def require_own(self, folder: Path) -> None:
        """Raise UserError for a folder that is not of this kind, whatever it belongs to."""
        try:
            self.read(folder)
        except UserError as error:
            raise self.something_else(folder) from error

    def find(self, folder: Path, about: dict[str, Any]) -> dict[str, Any] | None:
        """What the file says; None where the folder is empty or not there. Raises UserError for all else."""
        if (folder / self.file).exists():
            return self.require(folder, about)
        if folder.is_dir() and any(path.name != LOCK for path in folder.glob(self.foreign)):
            raise self.something_else(folder)
        return None

    def begin(self, folder: Path, about: dict[str, Any]) -> dict[str, Any]:
        """Take up a folder that belongs to `about`, or begin one; returns what its file says. Raises as find does."""
        if (there := self.find(folder, about)) is not None:
            return there
        named = dict(zip(("format", "version"), self.format, strict=True)) if self.format else {}
        write_files(folder, {self.file: as_json(named | about)})
        return named | about

    def seal(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the file of a folder that must stay as it is: with the digests of all others in it."""
        files = {path.name: digest_of(path) for path in sorted(folder.iterdir())}
        write_files(folder, {self.file: as_json(about | {"files": files})})

    def require_unchanged(self, folder: Path) -> None:
        """Raise UserError where a file is missing or is not as `seal` found it."""
        for name, digest in self.read(folder)["files"].items():
            if not (folder / name).is_file() or digest_of(folder / name) != digest:
                raise UserError(f"{folder}: {name} is missing or was changed; {self.again}")

    def unreadable(self, folder: Path, cause: str) -> UserError:
        """What is raised for a folder of this kind that cannot be used."""
        return UserError(f"{folder}: cannot be read as {self.holds} ({self.file}: {cause}); {self.again}")

    def something_else(self, folder: Path) -> UserError:
        """What is raised for a folder, or a file, that is not of this kind."""
        return UserError(f"{folder}: holds something else than {self.holds}; name another folder, or remove it")
