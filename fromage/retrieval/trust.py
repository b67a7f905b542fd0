"""Indexes that this user built on this machine, told from those that come from elsewhere.

A random secret in the user's folder of states (XDG_STATE_HOME, else ~/.local/state: fromage/secret, mode 0600) seals the
index.json of each index that is built here. An index without this seal is a stranger's: its images are opened where the user
names their folder, its Milvus is not asked, and its FAISS file is not read. `fromage index trust` seals one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from fromage.places import state_folder

SEAL = "built_here"  # the key of index.json
BYTES = 32


def secret() -> bytes | None:
    """The secret, drawn when it is first asked for; None where it cannot be kept, or others could read it."""
    try:
        path = state_folder() / "secret"
        with suppress(FileNotFoundError):
            return _read(path)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = path.with_name(f".secret.{os.getpid()}.{os.urandom(4).hex()}")
        file = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            os.write(file, os.urandom(BYTES))
            with suppress(FileExistsError):  # of several processes the first counts
                path.hardlink_to(part)
        finally:
            os.close(file)
            part.unlink()
        return _read(path)
    except (OSError, RuntimeError):
        return None


def _read(path: Path) -> bytes | None:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        about = os.fstat(file)
        private = stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o077
        found = os.read(file, BYTES + 1) if private else b""
    finally:
        os.close(file)
    return found if len(found) == BYTES else None


def derived(purpose: str) -> bytes:
    """32 bytes for one purpose: the same on every run of this user on this machine; of this call alone without a secret."""
    return hashlib.blake2b(purpose.encode(), key=secret() or os.urandom(BYTES), digest_size=32).digest()


def seal(purpose: str, data: bytes) -> str:
    """The seal of some data, for one purpose; '' where there is no secret."""
    key = secret()
    return hmac.new(key, purpose.encode() + b"\0" + data, "sha256").hexdigest() if key else ""


def holds(said: object, purpose: str, data: bytes) -> bool:
    """Whether data is as it was sealed on this machine."""
    made = seal(purpose, data)
    return bool(made) and isinstance(said, str) and hmac.compare_digest(made.encode(), said.encode("utf-8", "replace"))


def sealed(about: dict[str, Any]) -> dict[str, Any]:
    """An index.json with its seal, if there is a secret."""
    made = seal("index.json", _said(about))
    return about | ({SEAL: made} if made else {})


def is_sealed(about: dict[str, Any]) -> bool:
    """Whether an index.json is as it was sealed on this machine."""
    return holds(about.get(SEAL), "index.json", _said(about))


def _said(about: dict[str, Any]) -> bytes:
    return json.dumps({name: value for name, value in about.items() if name != SEAL}, sort_keys=True).encode()
