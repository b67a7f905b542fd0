"""Ports, and limits of connections beyond uvicorn's: slow senders, clients that do not read, many of one address."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Collection
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from fromage.serving.hosts import HostGuard
from fromage.serving.ports import listen

CONNECTIONS = 512  # at a time, idle ones included: a process may have about a thousand files open
PER_ADDRESS = 256  # connections of one address at a time; behind a reverse proxy all clients have the proxy's
CROWDED = 480  # connections at a time from which on a new one takes the place of the oldest that has not said what it wants
HEAD = 20.0  # seconds in which the head of a request must arrive, at most


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: at any free port. Raises UserError where that is not possible."""
    listening = listen(host, port)
    # without it each reply waits 40 ms for an acknowledgement
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def address(host: str, listening: socket.socket) -> str:
    """The address of a socket that listens, for a browser on this machine."""
    shown = "localhost" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"


def guarded(app: Any, host: str, seconds: float, origins: Collection[str] = (), **options: Any) -> uvicorn.Config:
    """How uvicorn serves an application: to names and origins that are allowed, within the limits of this module.

    options: uvicorn's.
    """
    limits: dict[str, Any] = {"http": limited(seconds), "limit_concurrency": CONNECTIONS}
    return uvicorn.Config(HostGuard(app, host, origins), **(limits | options))


def limited(seconds: float, per_address: int = PER_ADDRESS) -> type[asyncio.Protocol]:
    """A class of Limited with counts of its own, for uvicorn.Config(http=...)."""
    return type("Limited", (Limited,), {"seconds": seconds, "per_address": per_address, "open": Counter(), "waiting": {}})


class Limited(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
    """uvicorn's HTTP protocol with limits; `limited` makes a server's own class of it.

    Attributes:
        seconds: in which a client must take what was written, as far as it is buffered here; at most HEAD seconds of it
            are for the head of a request.
        per_address: connections of one address at a time. A further one takes the place of the oldest of them whose request
            has not arrived, so that half-sent requests lock nobody out; where there is none it is closed at once.
        open: the connections of each address.
        waiting: connections whose request has not arrived, the oldest first, and their address.
    """

    seconds: ClassVar[float]
    per_address: ClassVar[int]
    open: ClassVar[Counter[str]]
    waiting: ClassVar[dict[Any, str]]
    head: asyncio.TimerHandle | None = None
    unread: asyncio.TimerHandle | None = None
    counted = False

    def connection_made(self, transport: Any) -> None:
        """Count it, and close it or the oldest one that waits where there are too many."""
        super().connection_made(transport)
        self.address = str((transport.get_extra_info("peername") or [""])[0])
        full = self.open[self.address] >= self.per_address
        if full or len(self.connections) > CROWDED:
            among = (other for other, address in self.waiting.items() if not full or address == self.address)
            if oldest := next(among, None):
                oldest.leave()
                oldest.transport.abort()
        self.counted = self.open[self.address] < self.per_address
        self.open[self.address] += self.counted
        self.waiting[self] = self.address
        self.head = self.loop.call_later(min(self.seconds, HEAD), transport.abort)
        if not self.counted:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Time the head of a request."""
        super().data_received(data)
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            _stop(self.head)
            self.head = None
            self.waiting.pop(self, None)
        elif self.head is None:
            self.waiting[self] = self.address
            self.head = self.loop.call_later(min(self.seconds, HEAD), self.transport.abort)

    def pause_writing(self) -> None:
        """Time what the client does not take."""
        super().pause_writing()
        self.unread = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has taken it."""
        _stop(self.unread)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks, and count it no more."""
        _stop(self.head, self.unread)
        self.leave()
        super().connection_lost(exc)

    def leave(self) -> None:
        """Give its place free."""
        self.waiting.pop(self, None)
        self.open[self.address] -= self.counted
        self.counted = False
        if not self.open[self.address]:
            del self.open[self.address]


def _stop(*timers: asyncio.TimerHandle | None) -> None:
    for timer in timers:
        if timer is not None:
            timer.cancel()
