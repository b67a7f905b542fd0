"""Reading texts of any Unicode encoding, and writing whole or not at all: a part takes the name when it is on disk.

What a disk refuses, since it is full or may not be written to, is a UserError.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fromage.errors import UserError, reason
from fromage.locks import LOCK, InUse, held

WAIT = 0.5  # seconds between two looks at what another process makes
ABANDONED = 86400.0  # seconds without a new file, after which a folder that is being made is taken for left over
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}  # of file systems that cannot be told to write at once


def disk_error(error: OSError, path: Path | None = None, kept: str = "") -> UserError | None:
    """What to tell of a disk that is full, fails or may not be written to, or of a name too long; None for other errors.

    path: what was being written; where the error names a file elsewhere, this one is named. kept: what is there still, and
    how to go on.
    """
    if error.errno == errno.ENAMETOOLONG:
        return UserError(f"{str(error.filename or path or 'a name')[:60]}...: the name is too long; give a shorter one")
    if error.errno not in REFUSED:
        return None
    named, did = error.filename, "opened"
    if path is not None and (not isinstance(named, str) or Path(named).parent in (path, path.parent)):
        named, did = path, "written"
        kept = kept or ("what was there before is untouched" if path.exists() else "nothing is left of it")
    elif error.errno in FULL:
        did = "written"
    mend = "make room" if error.errno in FULL else "see to its permissions"
    parts = [f"{named or 'a file'}: cannot be {did} ({os.strerror(error.errno or 0)})", kept]
    return UserError("; ".join([*filter(None, parts), f"{mend}, or name another place"]))


@contextmanager
def writing(path: Path, kept: str = "") -> Iterator[None]:
    """Raise UserError where the disk refuses what the block writes; see disk_error."""
    try:
        yield
    except OSError as error:
        if (told := disk_error(error, path, kept)) is None:
            raise
        raise told from error


def check_new(path: Path, overwrite: bool = False) -> None:
    """Raise UserError for a file, or a folder that holds anything, that is there already and may not be replaced."""
    there = any(inside.name != LOCK for inside in path.iterdir()) if path.is_dir() else os.path.lexists(path)
    if there and not overwrite:
        raise UserError(
            f"{path}: is there already; name another place, or replace it: --overwrite, in Python overwrite=True"
        )


MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def encoding_of(start: bytes, name: object) -> str:
    """The encoding of a text that begins so: what its byte order mark says, else UTF-8. Raises UserError for null bytes."""
    encoding = next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in start[:64]:
        raise UserError(f"{name}: holds null bytes, as UTF-16 without a byte order mark does; save it as UTF-8")
    return encoding


def decode_text(data: bytes, name: object) -> str:
    """Bytes of a file as text. Raises UserError, which names the line, where they are not what encoding_of says."""
    encoding = encoding_of(data, name)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}: line {line} is not {encoding.upper()[:6].rstrip('-')}; save the file as UTF-8") from None


def read_text(path: Path, wanted: str) -> str:
    """The text of a file that a user names. Raises UserError for one that cannot be read; wanted: what to name instead."""
    try:
        return decode_text(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); name {wanted}") from error
    except ValueError as error:  # a null byte, or half a character
        raise UserError(f"{str(path)!r}: cannot be the name of a file; name {wanted}") from error


def read_json(path: Path, wanted: str) -> Any:
    """What a JSON file that a user names holds. Raises UserError as read_text does, and where it is no JSON."""
    return parse_json(read_text(path, wanted), path, wanted)


def parse_json(text: str, name: object, wanted: str) -> Any:
    """What a JSON text holds. Raises UserError, which gives the place, where it is none; name: of its file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        said = "is empty" if not text.strip() else f"is no JSON, or broken in line {error.lineno}, column {error.colno}"
    except RecursionError:
        said = "is nested too deep"
    except ValueError:
        said = "holds a number of too many digits"
    raise UserError(f"{name}: {said}; name {wanted}") from None


def json_object(data: str | bytes) -> dict[str, Any]:
    """The JSON object that a text holds; empty for what is none. For data of others, where a damaged one costs nothing."""
    try:
        found = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class WholeFile:
    """A file that takes its name when it is whole. A kill before that leaves the former file, and a part beside it.

        with WholeFile(path) as part:
            part.write_bytes(data)

    A block that fails leaves the former file and no part. Where one block cannot do it: write part, then keep or discard.

    Attributes:
        path: the name that the file takes.
        part: where it is written.
    """

    def __init__(self, path: Path, shared: bool = False, kept: str = "") -> None:
        """shared: several threads or processes may write this file at the same time, each its own part.

        kept: for the message of a disk that is full, what is there then and how to go on.
        """
        self.kept = kept
        own = f".{os.getpid()}.{threading.get_ident()}" if shared else ""
        self.path, self.part = path, path.with_name(f".{path.name}{own}.part")

    def keep(self) -> None:
        """Give the part its name once it is on disk; it replaces a file that is there at once."""
        sync(self.part)
        self.part.replace(self.path)

    def discard(self) -> None:
        """Remove the part; harmless after keep()."""
        with suppress(OSError):
            self.part.unlink(missing_ok=True)

    def __enter__(self) -> Path:
        with writing(self.path, self.kept):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.part

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *where: object) -> None:
        try:
            with writing(self.path, self.kept):
                if isinstance(error, OSError):
                    raise error
                if kind is None:
                    self.keep()
        finally:
            self.discard()


def sync(path: Path) -> None:
    """Wait until a file, or what names there are in a folder, is on disk: a loss of power leaves no file of zero bytes."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(number)


def digest_of(file: Path) -> str:
    """SHA-256 of a file, in hex digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def as_json(value: Any) -> bytes:
    """JSON for people to read."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole."""
    with WholeFile(path) as part:
        part.write_bytes(as_json(value))


def write_files(folder: Path, files: Mapping[str, bytes], remove: Sequence[str] = ()) -> None:
    """Write files into a folder; they get their names, in the order given, when all are on disk.

    remove: names of files that go before the first one gets its name.
    """
    whole = [WholeFile(folder / name) for name in files]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in whole:
            file.part.write_bytes(files[file.path.name])
        for name in remove:
            (folder / name).unlink(missing_ok=True)
        for file in whole:
            file.keep()
    except OSError as error:
        told = disk_error(error, folder) or UserError(
            f"{folder}: cannot be written ({reason(error)}); choose another folder"
        )
        raise told from error
    finally:
        for file in whole:
            file.discard()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder for the block to fill. At the end it takes the name `folder`, and replaces a folder that is there.

    A block that fails leaves the former folder. So does a kill, but for one between the two renames: then the former folder
    is at set_aside(folder). Raises UserError where another process is writing it.
    """
    folder = folder.resolve()  # the folder that a link names is replaced, not the link
    folder.parent.mkdir(parents=True, exist_ok=True)
    with held(folder, beside=True):
        yield from _filled(folder)


def fill_once(folder: Path, fill: Callable[[Path], object]) -> None:
    """Make a folder, whole, unless it is there; where another process is making it, wait for that one.

    fill: writes what belongs into a new folder, which then takes its name.
    """
    while not folder.exists():
        with suppress(InUse), writing(folder), whole_folder(folder) as new:
            fill(new)
        if not folder.exists():
            time.sleep(WAIT)


def _filled(folder: Path) -> Iterator[Path]:
    new, old = folder.with_name(f".{folder.name}.{os.getpid()}.new"), set_aside(folder)
    for left in folder.parent.iterdir():
        if re.fullmatch(re.escape(f".{folder.name}.") + r"\d+\.new", left.name):  # by a process that was killed
            with suppress(OSError):  # it went meanwhile
                if left == new or time.time() - left.stat().st_mtime > ABANDONED:  # not every file system has locks
                    shutil.rmtree(left, ignore_errors=True)
    try:
        new.mkdir()
        yield new
        for path in (*(path for path in new.rglob("*") if not path.is_symlink()), new):
            sync(path)
        _swap(new, folder, old)
        sync(folder.parent)
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
