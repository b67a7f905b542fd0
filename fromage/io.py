"""Writing whole or not at all: a part is written beside the name, and takes the name when it is on disk."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fromage.errors import UserError


class WholeFile:
    """A file that takes its name when it is whole. A kill before that leaves the former file, and a part beside it.

        with WholeFile(path) as part:
            part.write_bytes(data)

    A block that fails leaves the former file and no part. Where one block cannot do it: write part, then keep or discard.

    Attributes:
        path: the name that the file takes.
        part: where it is written.
    """

    def __init__(self, path: Path, shared: bool = False) -> None:
        """shared: several threads or processes may write this file at the same time, each its own part."""
        own = f".{os.getpid()}.{threading.get_ident()}" if shared else ""
        self.path, self.part = path, path.with_name(f".{path.name}{own}.part")

    def keep(self) -> None:
        """Give the part its name; it replaces a file that is there at once."""
        self.part.replace(self.path)

    def discard(self) -> None:
        """Remove the part; harmless after keep()."""
        with suppress(OSError):
            self.part.unlink(missing_ok=True)

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.part

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self.keep()
        finally:
            self.discard()


def as_json(value: Any) -> bytes:
    """JSON for people to read."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole."""
    with WholeFile(path) as part:
        part.write_bytes(as_json(value))


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder; they get their names, in the order given, when all are on disk."""
    whole = [WholeFile(folder / name) for name in files]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in whole:
            file.part.write_bytes(files[file.path.name])
        for file in whole:
            file.keep()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); choose another folder") from error
    finally:
        for file in whole:
            file.discard()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder for the block to fill. At the end it takes the name `folder`, and replaces a folder that is there.

    A block that fails leaves the former folder. So does a kill, but for one between the two renames: then the former folder
    is at set_aside(folder).
    """
    new, old = folder.with_name(f".{folder.name}.{os.getpid()}.new"), set_aside(folder)
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        _swap(new, folder, old)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Where a folder is while the one that replaces it takes its name."""
    return folder.with_name(f".{folder.name}.old")


def _swap(new: Path, folder: Path, old: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed here
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
