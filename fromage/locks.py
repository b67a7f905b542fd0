"""A folder belongs to the process that writes it: a lock that the kernel frees when that process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fromage.errors import UserError


class InUse(UserError):
    """A folder that another process, or another thread, writes."""


LOCK = ".lock"  # its name in a folder; one that is replaced as a whole has its lock beside it
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # of file systems that know none

_held: dict[tuple[int, Path], int] = {}  # process and lock file: the thread that holds it


@contextmanager
def held(folder: str | Path, beside: bool = False) -> Iterator[None]:
    """Keep other processes, and other threads, from writing a folder while the block runs; it is made if need be.

    beside: the folder is replaced as a whole, so that the lock must lie beside it. Blocks of one thread may be nested.
    Raises UserError, which names the process that writes the folder.
    """
    real = Path(folder).resolve()  # or a link and its folder would have a lock each
    path = real.with_name(f".{real.name}.lock") if beside else real / LOCK
    key, me = (os.getpid(), path), threading.get_ident()  # a fork knows what its parent holds, but holds nothing
    nested = _held.get(key) == me
    if _held.setdefault(key, me) != me:
        raise _busy(Path(folder), str(os.getpid()))
    if nested:
        yield
        return
    try:
        with _locked(path, Path(folder)):
            yield
    finally:
        del _held[key]


@contextmanager
def _locked(path: Path, folder: Path) -> Iterator[None]:
    file = _taken(path, folder)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # while it is held, so that nobody else's goes
        file.close()


def _taken(path: Path, folder: Path) -> IO[str]:
    """The lock file, locked. By POSIX locks, which a fork, such as a worker that outlives us, does not inherit."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{folder}: cannot be a folder, since a file is in the way; name another place") from error
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, file):  # not one that was just given up
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                return file
        except OSError as error:
            if error.errno in NO_LOCKS:
                return file
            file.seek(0)
            holder = file.read(20)
            file.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise _busy(folder, holder) from error
        file.close()


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _busy(folder: Path, holder: str) -> InUse:
    by = f"process {holder}" if holder.strip().isdigit() else "another process"
    return InUse(f"{folder}: is in use by {by}, which writes it; wait until it ends, or name another folder")
