"""Limits to connections that uvicorn does not set: slow senders, clients that do not read, many from one address."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, ClassVar

from uvicorn.protocols.http.auto import AutoHTTPProtocol

PER_ADDRESS = 256  # connections of one address at a time; behind a reverse proxy all clients have the proxy's
HEAD = 20.0  # seconds in which the head of a request must arrive, at most


def limited(seconds: float, per_address: int = PER_ADDRESS) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with limits, for uvicorn.Config(http=...).

    Args:
        seconds: in which a client must take what was written, as far as it is buffered here; at most HEAD seconds of it
            are for the head of a request.
        per_address: connections of one address at a time; a further one is closed at once.
    """

    class Limited(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
        open: ClassVar[Counter[str]] = Counter()
        head: asyncio.TimerHandle | None = None
        unread: asyncio.TimerHandle | None = None
        counted = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.address = str((transport.get_extra_info("peername") or [""])[0])
            self.counted = self.open[self.address] < per_address
            self.open[self.address] += self.counted
            self.head = self.loop.call_later(min(seconds, HEAD), transport.abort)
            if not self.counted:
                transport.abort()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            answering = self.cycle is not None and not self.cycle.response_complete
            if answering:
                _stop(self.head)
                self.head = None
            elif self.head is None:
                self.head = self.loop.call_later(min(seconds, HEAD), self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.unread = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            _stop(self.unread)
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            _stop(self.head, self.unread)
            self.open[self.address] -= self.counted
            if not self.open[self.address]:
                del self.open[self.address]
            super().connection_lost(exc)

    return Limited


def _stop(*timers: asyncio.TimerHandle | None) -> None:
    for timer in timers:
        if timer is not None:
            timer.cancel()
