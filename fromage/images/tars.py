"""The files in a tar, as strangers write them: nothing that a header claims is believed before it is looked at."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

from fromage.checks import HALVES

MAX_MEMBER = 1 << 27  # bytes of a file: what a compressed tar claims costs its sender nothing
MAX_FIELDS = 1 << 20  # bytes of a long name, or of pax's further fields, which are read whole
FIELDS = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
META = re.compile(r"__[^/]*__($|/)")  # webdataset's own members
DAMAGED = "a header is damaged"
CHUNK = 1 << 20  # bytes of what is behind the end
RAISED = (ValueError, LookupError, ArithmeticError, AttributeError, TypeError, RecursionError)  # by fields of any content
Lost = Callable[[str, str], None]


class _Header(tarfile.TarInfo):
    """A header whose size is looked at before anything is read by it. tarfile itself takes a damaged one for the end.

    The end of a file is none: a tar ends with a block of zeros.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Any:
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("a header is cut off" if buf else "its end is missing")
        try:
            header = super().frombuf(buf, encoding, errors)  # type: ignore[arg-type]
        except tarfile.InvalidHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError(DAMAGED) from None
        if header.size < 0 or (header.type in FIELDS and header.size > MAX_FIELDS):
            raise tarfile.ReadError(f"a header claims {header.size:,} bytes")
        return header


def plain_files(stream: Any, lost: Lost = lambda name, why: None, mode: Literal["r", "r|*"] = "r|*") -> Iterator[
    tuple[str, Callable[[], bytes]]
]:  # fmt: skip
    """(name, its reader) of each plain file of a tar, compressed or not; to be read before the next one is asked for.

    The stream is read to its end. A link, a device, a sparse file and a name that is no text go to lost(name, why). mode:
    'r' for a stream that seeks.
    Raises TarError, EOFError or OSError for what is no tar, or damaged, and for a member of more than MAX_MEMBER bytes: to
    pass over it, tarfile would count up to there.
    """
    try:
        opened: Any = tarfile.open(fileobj=stream, mode=mode, tarinfo=_Header)  # noqa: SIM115
    except (tarfile.ReadError, zlib.error, *RAISED):
        raise tarfile.ReadError("no tar, or its beginning is damaged") from None
    with opened as tar:
        while (member := _next(tar)) is not None:
            if member.isdir() or META.match(member.name):
                continue
            if member.size > MAX_MEMBER:
                raise tarfile.ReadError(f"member {_shown(member)} claims {member.size:,} bytes, more than {MAX_MEMBER:,}")
            if not member.isreg() or member.issparse():
                lost(_shown(member), "is no plain file")
            elif HALVES.search(member.name):
                lost(_shown(member), "has a name that is not UTF-8")
            else:
                yield member.name, partial(_read, tar, member)
        while rest := tar.fileobj.read(CHUNK):
            if rest.strip(b"\0"):  # a hole, with members after it
                raise tarfile.ReadError("there is more behind its end")


def _shown(member: tarfile.TarInfo) -> str:
    return member.name.encode("utf-8", "replace").decode()


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        member = tar.next()
    except RAISED:
        raise tarfile.ReadError(DAMAGED) from None
    tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every member it has seen
    if member is not None and member.size < 0:
        raise tarfile.ReadError(f"a header claims {member.size:,} bytes")
    return member


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # a plain file
    return file.read()
