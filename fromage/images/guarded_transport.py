"""A transport for httpx that connects to public addresses only, and has a deadline.

A page may name any address, and a server that fetches it for a stranger must not become a way into the server's own
network. Each host is resolved once per connection, all its addresses must be public, and the connection goes to one of
those just checked: there is no second look-up that could answer otherwise. TLS and the Host header keep the name.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import cache
from typing import Any

import httpcore
import httpx

TRIED = 4  # addresses of a host
EMBEDS_IPV4 = [ipaddress.ip_network(prefix) for prefix in ("::/96", "::ffff:0:0/96", "64:ff9b::/96")]  # in the last 32 bits
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # the part of IPv6 that is given out
NOT_PUBLIC = [  # special-purpose ranges (IANA) that some versions of ipaddress call global
    ipaddress.ip_network(prefix)
    for prefix in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "2620:4f:8000::/48", "3fff::/20")
]
# What the transport raises when a host cannot be reached, is too slow or breaks off; another attempt may succeed.
CONNECTION_ERRORS = (OSError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)


class Refused(Exception):
    """What another attempt would not mend."""


class GuardedTransport(httpx.BaseTransport):
    """HTTP/1.1 over GuardedBackend, without proxies. Use it with httpx.Client(timeout=None): it keeps the time itself."""

    def __init__(self, deadline: float, connect: float, allow_private: bool = False) -> None:
        """deadline: on time.monotonic's clock, for all requests; connect: seconds for each address of a host."""
        backend = GuardedBackend(deadline, connect, allow_private)
        self.pool = httpcore.ConnectionPool(_tls_context(), network_backend=backend)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request. Raises Refused, or one of CONNECTION_ERRORS; reading the body raises the latter too."""
        url = request.url
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        answer = self.pool.handle_request(httpcore.Request(request.method, target, headers=request.headers.raw))
        return httpx.Response(
            answer.status, headers=answer.headers, stream=_Body(answer.stream), extensions=answer.extensions
        )

    def close(self) -> None:
        """Close all connections."""
        self.pool.close()


class _Body(httpx.SyncByteStream):
    """The body of an answer, from httpcore to httpx."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[bytes]:
        yield from self.stream

    def close(self) -> None:
        self.stream.close()


class GuardedBackend(httpcore.NetworkBackend):
    """Opens connections to public addresses (with allow_private: to any), which end at a deadline."""

    def __init__(self, deadline: float, connect: float, allow_private: bool = False) -> None:
        self.deadline, self.connect, self.allow_private = deadline, connect, allow_private
        self.inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to one of a host's addresses. Raises Refused where one of them is not public."""
        addresses = resolve(host, port, self.deadline)
        if not self.allow_private and not all(map(is_public, addresses)):
            raise Refused("its host is in a private network, from which nothing is fetched")
        failure: Exception = OSError("its host has no address")
        for address in addresses[:TRIED]:
            seconds = min(self.connect, _remaining(self.deadline))
            try:
                stream = self.inner.connect_tcp(address, port, seconds, local_address, socket_options)
                return GuardedStream(stream, self.deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class GuardedStream(httpcore.NetworkStream):
    """A connection that fails at the deadline, whatever the other side is doing.

    A socket's own time-out begins again with every byte.
    """

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self.stream, self.deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Bytes as they come; none at the end."""
        return self.stream.read(max_bytes, _remaining(self.deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send everything."""
        self.stream.write(buffer, _remaining(self.deadline))

    def close(self) -> None:
        """Close the connection."""
        self.stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """The same connection with TLS, for the host of this name."""
        stream = self.stream.start_tls(ssl_context, server_hostname, _remaining(self.deadline))
        return GuardedStream(stream, self.deadline)

    def get_extra_info(self, info: str) -> Any:
        """What httpcore wants to know of the connection."""
        return self.stream.get_extra_info(info)


def _remaining(deadline: float) -> float:
    """Seconds until the deadline. Raises httpcore.ReadTimeout after it."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise httpcore.ReadTimeout("too slow")
    return seconds


@cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()  # the system's certificates; httpcore's default are those of certifi


def resolve(host: str, port: int, deadline: float) -> list[str]:
    """A host's addresses, as text.

    getaddrinfo knows no time-out; at the deadline it is left behind in a thread of its own.

    Raises:
        Refused: the host is unknown.
        OSError: the resolver does not answer (TimeoutError: not in time).
    """
    answer: Future[list[Any]] = Future()

    def ask() -> None:
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return [str(address[0]) for *_, address in answer.result(_remaining(deadline))]
    except (socket.gaierror, UnicodeError) as error:
        if getattr(error, "errno", None) == socket.EAI_AGAIN:
            raise
        raise Refused("its host is unknown") from error


def is_public(address: str | int) -> bool:
    """Whether an IP address is one of the internet; an IPv4 address within an IPv6 one counts as itself.

    Embedded are mapped and compatible addresses, NAT64 (RFC 6052) and 6to4. Teredo and local-use NAT64 are not public.
    """
    ip = ipaddress.ip_address(str(address).partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embeds = any(ip in network for network in EMBEDS_IPV4)
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if embeds else ip.sixtofour or ip
    if any(ip in network for network in NOT_PUBLIC) or (ip.version == 6 and ip not in GLOBAL_UNICAST):
        return False
    return ip.is_global and not ip.is_multicast
