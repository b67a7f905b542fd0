"""Opening a shard to read: a file, an object at a URL that fsspec knows, or what a command writes."""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, Protocol

import fsspec

from fromage.errors import UserError, first_line

STREAMED = ("http", "https", "hf")  # protocols that give a file from begin to end, without ranges, with block_size 0
MOST_JSON = 1 << 24  # bytes of sizes.json at a URL
CONNECT, STALLED = 30, 60  # seconds until a web server takes the connection, and without a byte from it
PATIENCE = 120  # seconds without a byte from a command after which it counts as failed


class Readable(Protocol):
    """What a tar is read from."""

    def read(self, size: int, /) -> bytes:
        """Up to so many bytes; none at the end."""

    def close(self) -> None:
        """Give everything back."""


def is_remote(shard: str) -> bool:
    """Whether reading a shard may succeed at another attempt: it is a URL or a command."""
    return shard.startswith("pipe:") or "://" in shard


def open_shard(shard: str) -> Readable:
    """Open a path, a URL or 'pipe:COMMAND'. Raises OSError, as reading does."""
    if shard.startswith("pipe:"):
        return CommandReader(shard.removeprefix("pipe:"))
    return RemoteReader(shard) if is_remote(shard) else Path(shard).open("rb")


def check_protocol(url: str) -> None:
    """Raises UserError where nothing that is installed reads such a URL."""
    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        way = f"or name a command that writes the shard: 'pipe:COMMAND {url}'"
        raise UserError(f"{url}: {first_line(error)} (pip install s3fs for s3://, gcsfs for gs://), {way}") from error


class RemoteReader:
    """A file at a URL, read by fsspec. Whatever goes wrong on the way is an OSError."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.file: Any = self._or_oserror(lambda: _open(url))

    def read(self, size: int) -> bytes:
        """Up to so many bytes; none at the end."""
        return self._or_oserror(lambda: self.file.read(size))

    def close(self) -> None:
        """Close the connection."""
        self._or_oserror(self.file.close)

    def _or_oserror(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except FileNotFoundError:
            raise FileNotFoundError("there is no such file") from None
        except Exception as error:  # each protocol has errors of its own
            said = (first_line(error) or type(error).__name__).replace(self.url, "it")  # which may hold a password
            raise OSError(said) from error


def _open(url: str) -> Any:
    """A file of fsspec; a web server has STALLED seconds for each byte, and proxies of the environment are used."""
    protocol, options = url.partition("://")[0], {}
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=CONNECT, sock_read=STALLED)
        options = {"encoded": True, "client_kwargs": {"timeout": timeout, "trust_env": True}}
    fs, path = fsspec.url_to_fs(url, **options)
    return fs.open(path, "rb", **({"block_size": 0} if protocol in STREAMED else {}))


def read_remote_json(url: str) -> Any:
    """What a JSON file at a URL holds; None where there is none. Raises OSError, ValueError."""
    try:
        file = RemoteReader(url)
    except FileNotFoundError:
        return None
    parts: list[bytes] = []
    try:
        while part := file.read(1 << 20):
            parts.append(part)
            if sum(map(len, parts)) > MOST_JSON:
                raise OSError(f"holds more than {MOST_JSON >> 20} MiB")
    finally:
        with suppress(OSError):
            file.close()
    return json.loads(b"".join(parts))


class CommandReader:
    """What a command writes, to read. One that fails or writes nothing for PATIENCE seconds raises OSError at that point."""

    def __init__(self, command: str) -> None:
        self.process = Popen(command, shell=True, stdout=PIPE, bufsize=0, start_new_session=True)
        self.output: Any = self.process.stdout

    def read(self, size: int) -> bytes:
        """Up to so many bytes; none at the end."""
        if not select.select([self.output], [], [], PATIENCE)[0]:
            raise OSError(f"nothing came for {PATIENCE} seconds")
        data = self.output.read(size)
        if not data and (code := self.process.wait(PATIENCE)):
            raise OSError(f"the command failed with exit code {code}")
        return data

    def close(self) -> None:
        """End the command and whatever it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.output.close()
