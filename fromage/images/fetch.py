"""Images on the web: fetched within limits of time and size, kept in a cache, and never from the inner network.

Redirects are followed one by one, each through the same guard. Proxies are not used.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from PIL import Image

from fromage.errors import BrokenSample, UserError, first_line
from fromage.images.codec import STRANGERS_PIXELS
from fromage.images.decode_process import decode_apart
from fromage.images.guarded_transport import CONNECTION_ERRORS, GuardedTransport, Refused
from fromage.io import WholeFile
from fromage.places import cache_folder

FRESH = 3600.0  # seconds for which an image that a user names is not fetched again
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # answers after which another attempt may succeed
HEADERS = {"User-Agent": "fromage (image retrieval)", "Accept": "image/*", "Accept-Encoding": "identity"}


@dataclass(frozen=True)
class FetchLimits:
    """What an image may cost. Times in seconds, sizes in bytes."""

    connect: float = 3.0  # to one of the host's addresses
    total: float = 10.0  # of all attempts, redirects and waits together
    size: int = 20 << 20
    pixels: int = STRANGERS_PIXELS
    attempts: int = 3
    redirects: int = 5
    cache: int = 1 << 30  # of all images that are kept


def fetch_image(
    url: str,
    limits: FetchLimits | None = None,
    cache: Path | None = None,
    allow_private: bool = False,
    max_age: float | None = None,
) -> Image.Image:
    """The RGB image at an http or https address.

    Args:
        cache: folder in which images are kept, those used longest ago making room; None for images in cache_folder().
        allow_private: also fetch from this machine and its network.
        max_age: seconds after which an image that is kept is fetched again; None: never, as for those of an index.

    Raises:
        UserError: the address is not allowed, does not answer in time, or answers with anything but an image.
    """
    limits, folder = limits or FetchLimits(), cache or cache_folder() / "images"
    kept = folder / hashlib.sha256(f"{allow_private} {url}".encode("utf-8", "replace")).hexdigest()
    with suppress(OSError, BrokenSample):
        now, fetched = time.time(), kept.stat().st_mtime
        if max_age is None or abs(now - fetched) < max_age:
            image = decode_apart(kept.read_bytes(), limits.pixels)
            os.utime(kept, (now, fetched))  # used lately
            return image
    try:
        data = _attempts(url, limits, allow_private)
        image = decode_apart(data, limits.pixels)
    except (Refused, BrokenSample, httpx.HTTPError, *CONNECTION_ERRORS) as error:
        raise UserError(f"{url[:200]}: {first_line(error)}; choose another image or try later") from error
    with suppress(OSError, UserError):  # a full or read-only disk costs time, not the image
        _keep(kept, data, limits.cache)
    return image


def _keep(path: Path, data: bytes, limit: int) -> None:
    """Write a file of the cache, whole or not at all, and remove the ones used longest ago beyond the limit."""
    with WholeFile(path, shared=True) as part:
        part.write_bytes(data)
    files = sorted((entry.stat().st_atime, entry.stat().st_size, entry.path) for entry in os.scandir(path.parent))
    excess = sum(size for _, size, _ in files) - limit
    for _, size, name in files:
        if excess <= 0:
            return
        Path(name).unlink(missing_ok=True)
        excess -= size


def _attempts(url: str, limits: FetchLimits, allow_private: bool) -> bytes:
    """Fetch, again after a while where the cause may pass."""
    deadline = time.monotonic() + limits.total
    transport = GuardedTransport(deadline, limits.connect, allow_private)
    with httpx.Client(transport=transport, headers=HEADERS, timeout=None, trust_env=False) as client:
        for attempt in range(limits.attempts):
            try:
                return _follow(client, url, limits)
            except CONNECTION_ERRORS as error:
                wait = 0.3 * 2**attempt
                if time.monotonic() + wait >= deadline:
                    raise Refused(f"no answer within {limits.total:g} s") from error
                if attempt + 1 == limits.attempts:
                    raise
                time.sleep(wait)
    raise Refused("no attempt is allowed")


def _follow(client: httpx.Client, url: str, limits: FetchLimits) -> bytes:
    """Fetch, from where redirects lead to. The client would follow them too, but reads their bodies whole."""
    request = client.build_request("GET", _parse(url))
    for _ in range(limits.redirects + 1):
        with closing(client.send(request, stream=True)) as answer:
            if answer.next_request is None:
                return _read(answer, limits.size)
            request = answer.next_request
            _parse(str(request.url))
    raise Refused(f"more than {limits.redirects} redirects")


def _parse(url: str) -> httpx.URL:
    with suppress(httpx.InvalidURL):
        parts = httpx.URL(url)
        port = 80 if parts.port is None else parts.port
        if parts.scheme in ("http", "https") and parts.host and 0 < port < 1 << 16:
            return parts
    raise Refused("is no http or https address")


def _read(answer: httpx.Response, size: int) -> bytes:
    """A body of so many bytes at most, as it was sent: nothing is decompressed."""
    if answer.status_code in TRANSIENT:
        raise OSError(f"answers {answer.status_code} {answer.reason_phrase}")
    if answer.status_code != 200:
        raise Refused(f"answers {answer.status_code} {answer.reason_phrase}")
    announced = answer.headers.get("Content-Length", "")
    body, too_large = bytearray(), announced.isdecimal() and int(announced) > size
    for block in () if too_large else answer.iter_raw():
        body += block
        if too_large := len(body) > size:
            break
    if too_large:
        raise Refused(f"is larger than {size / (1 << 20):g} MiB")
    return bytes(body)
