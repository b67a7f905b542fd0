"""Images on the web: fetched within limits of time and size, kept in a cache, and never from the inner network.

A page may name any address, and a server that fetches it for a stranger must not become his way into its own network:
the name is resolved once, every address it has must be public, and the connection goes to one of these. Redirects are
checked in the same way. Proxies are not used.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from PIL import Image

from fromage.errors import BrokenSample, UserError, first_line
from fromage.images.codec import STRANGERS_PIXELS, decode_image
from fromage.io import WholeFile

TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # answers after which another attempt may succeed
REDIRECTS = {301, 302, 303, 307, 308}
HEADERS = {"User-Agent": "fromage (image retrieval)", "Accept": "image/*", "Accept-Encoding": "identity"}
HOLD_IPV4 = [ipaddress.ip_network(prefix) for prefix in ("::/96", "::ffff:0:0/96", "64:ff9b::/96")]
ADDRESSES = 4  # of a host that are tried
BLOCK = 1 << 16  # bytes


@dataclass(frozen=True)
class Limits:
    """What an image may cost. Times in seconds, sizes in bytes."""

    connect: float = 3.0  # to one of the host's addresses
    total: float = 10.0  # of all attempts, redirects and waits together
    size: int = 20 << 20
    pixels: int = STRANGERS_PIXELS
    attempts: int = 3
    redirects: int = 5
    cache: int = 1 << 30  # of all images that are kept


class _Refused(Exception):
    """What another attempt would not mend."""


def cache_folder() -> Path:
    """FROMAGE_CACHE, else fromage in the user's folder of caches."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fromage"
    return Path(os.environ.get("FROMAGE_CACHE") or default) / "images"


def fetch_image(
    url: str, limits: Limits | None = None, cache: Path | None = None, allow_private: bool = False
) -> Image.Image:
    """The RGB image at an http or https address.

    Args:
        cache: folder in which images are kept, the oldest making room; cache_folder() if None.
        allow_private: also fetch from this machine and its network.

    Raises:
        UserError: the address is not allowed, does not answer in time, or answers with anything but an image.
    """
    limits, folder = limits or Limits(), cache or cache_folder()
    kept = folder / hashlib.sha256(f"{allow_private} {url}".encode("utf-8", "replace")).hexdigest()
    with suppress(OSError, BrokenSample):
        image = decode_image(kept.read_bytes(), limits.pixels)
        os.utime(kept)  # used lately
        return image
    try:
        data = _attempts(url, limits, allow_private)
        image = decode_image(data, limits.pixels)
    except (_Refused, BrokenSample, OSError, http.client.HTTPException) as error:
        raise UserError(f"{url[:200]}: {first_line(error)}; choose another image or try later") from error
    with suppress(OSError):  # a full or read-only disk costs time, not the image
        _keep(kept, data, limits.cache)
    return image


def _keep(path: Path, data: bytes, limit: int) -> None:
    """Write a file of the cache, whole or not at all, and remove the ones used longest ago beyond the limit."""
    with WholeFile(path, shared=True) as part:
        part.write_bytes(data)
    files = sorted((entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in os.scandir(path.parent))
    excess = sum(size for _, size, _ in files) - limit
    for _, size, name in files:
        if excess <= 0:
            return
        Path(name).unlink(missing_ok=True)
        excess -= size


def _attempts(url: str, limits: Limits, allow_private: bool) -> bytes:
    """Fetch, again after a while where the cause may pass."""
    deadline = time.monotonic() + limits.total
    for attempt in range(limits.attempts):
        try:
            return _follow(url, limits, deadline, allow_private)
        except (OSError, http.client.HTTPException) as error:
            wait = 0.3 * 2**attempt
            if time.monotonic() + wait >= deadline:
                raise _Refused(f"no answer within {limits.total:g} s") from error
            if attempt + 1 == limits.attempts:
                raise
            time.sleep(wait)
    raise _Refused("no attempt is allowed")


def _follow(url: str, limits: Limits, deadline: float, allow_private: bool) -> bytes:
    """Fetch, from where redirects lead to."""
    for _ in range(limits.redirects + 1):
        answer = _get(_parse(url), limits, deadline, allow_private)
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise _Refused(f"more than {limits.redirects} redirects")


def _parse(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or parts.port == 0:
            raise ValueError
    except ValueError:
        raise _Refused("is no http or https address") from None
    return parts


def _get(url: SplitResult, limits: Limits, deadline: float, allow_private: bool) -> bytes | str:
    """The body at an address, or where it redirects to."""
    host, secure = str(url.hostname), url.scheme == "https"
    port = url.port or (443 if secure else 80)
    sock = _connect(_resolve(host, port, deadline, allow_private), limits.connect, deadline)
    if secure:
        context = ssl.create_default_context()
        sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    with sock, _hung_up_at(deadline, sock):
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(host, port)
        connection.sock = sock  # it would look the name up again, and might be told another address
        target = quote((url.path or "/") + (f"?{url.query}" if url.query else ""), safe="/%?&=:;,@+$!*'()~[]")
        connection.request("GET", target, headers=HEADERS)
        with connection.getresponse() as answer:
            return _read(answer, limits.size)


@contextmanager
def _hung_up_at(deadline: float, sock: socket.socket) -> Iterator[None]:
    """End whatever the socket is at when the time is over; its own time-out begins anew with every byte."""
    seconds = deadline - time.monotonic()
    sock.settimeout(max(0.01, seconds))
    alarm = threading.Timer(seconds, _hang_up, [sock])
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()
        if time.monotonic() >= deadline:
            raise TimeoutError("too slow")


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _read(answer: http.client.HTTPResponse, size: int) -> bytes | str:
    """A body of so many bytes at most, or the address of a redirect."""
    if answer.status in REDIRECTS and (where := answer.getheader("Location")):
        return where
    if answer.status in TRANSIENT:
        raise OSError(f"answers {answer.status} {answer.reason}")
    if answer.status != 200:
        raise _Refused(f"answers {answer.status} {answer.reason}")
    body, announced = bytearray(), answer.length or 0
    while max(len(body), announced) <= size and (block := answer.read(BLOCK)):
        body += block
    if max(len(body), announced) > size:
        raise _Refused(f"is larger than {size / (1 << 20):g} MiB")
    if answer.length:
        raise http.client.IncompleteRead(b"", answer.length)
    return bytes(body)


def _resolve(host: str, port: int, deadline: float, allow_private: bool) -> list[Any]:
    """A host's addresses as getaddrinfo gives them, all of which must be public.

    getaddrinfo knows no time-out; when the time is over it is left behind in a thread of its own.
    """
    answer: Future[list[Any]] = Future()

    def ask() -> None:
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        found = answer.result(max(0.01, deadline - time.monotonic()))
    except (socket.gaierror, UnicodeError) as error:
        if getattr(error, "errno", None) == socket.EAI_AGAIN:
            raise
        raise _Refused("its host is unknown") from error
    if not allow_private and not all(is_public(address[0]) for *_, address in found):
        raise _Refused("its host is in a private network, from which nothing is fetched")
    return found


def _connect(found: list[Any], seconds: float, deadline: float) -> socket.socket:
    """Connect to one of some addresses; so many seconds for each, as long as there is time."""
    failure = OSError("its host has no address")
    for family, kind, protocol, _, address in found[:ADDRESSES]:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(0.01, min(seconds, deadline - time.monotonic())))
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def is_public(address: str | int) -> bool:
    """Whether an IP address is one of the internet; an IPv4 address within an IPv6 one counts as itself."""
    ip = ipaddress.ip_address(str(address).partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        held = any(ip in network for network in HOLD_IPV4)
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if held else ip.sixtofour or ip
    return ip.is_global and not ip.is_multicast
