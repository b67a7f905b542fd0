"""Limits of HTTP requests: their size and structure, the time in which they must arrive, and the number of open ones."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fromage.serving.refusals import refusal

BODY = 32 << 20  # bytes of a request
MARKS = b",:[{"  # of JSON's structure; base64 has none of them
MOST_MARKS = 500_000  # of a request, since all others wait while it is parsed
SLOW = 2.0  # seconds after which a body that is still arriving gives its place to the next request, if all are taken
BUSY = "too many requests wait; try later"


class BodyLimit:
    """ASGI middleware that reads the body of a POST before it passes the request on, or refuses it by 429, 413 or 408.

    Bodies of other requests are never read. Who only begins bodies keeps nobody out: where all places are taken, the body
    that has been arriving for longest, and for more than SLOW seconds, is refused in favour of the next request.
    """

    def __init__(self, app: ASGIApp, requests: int, seconds: float, size: int = BODY) -> None:
        """requests: maximum number of open requests. seconds: time limit of a whole body. size: maximum size in bytes."""
        self.app, self.free, self.seconds, self.size = app, requests, seconds, size
        self.arriving: dict[asyncio.Timeout, float] = {}  # until when, and since when; the oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope.get("method") != "POST":
            return await self.app(scope, receive, send)
        if self.free <= 0 and not self._give_way():
            return await refusal(scope["path"], 429, BUSY, {"Retry-After": "1"})(scope, receive, send)
        self.free -= 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self.free += 1

    def _give_way(self) -> bool:
        """End the slowest body; whether there is one."""
        now = asyncio.get_running_loop().time()
        oldest = next(iter(self.arriving), None)
        if oldest is None or now - self.arriving[oldest] < SLOW:
            return False
        del self.arriving[oldest]
        with suppress(RuntimeError):  # its time is over this very moment
            oldest.reschedule(now)
        return True

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.seconds) as arriving:
                self.arriving[arriving] = asyncio.get_running_loop().time()
                try:
                    body = await self._read(scope, receive)
                finally:
                    self.arriving.pop(arriving, None)
        except (TimeoutError, ValueError) as error:
            status, detail = (
                (413, str(error)) if isinstance(error, ValueError) else (408, "the request took too long to arrive")
            )
            return await refusal(scope["path"], status, detail)(scope, receive, send)
        rest = iter([body])

        async def replay() -> Message:
            return next(rest, None) or await receive()

        return await self.app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> Message:
        """The body as one message, or the message that the client has left. Raises ValueError for one beyond the limits."""
        announced = dict(scope["headers"]).get(b"content-length", b"")
        size, parts = int(announced) if announced.isdigit() else 0, []
        left = self.size
        while size <= self.size and left >= 0:
            message = await receive()
            if message["type"] != "http.request":
                return message
            parts.append(message.get("body", b""))
            left -= len(parts[-1])
            if left >= 0 and not message.get("more_body"):
                body = b"".join(parts)
                if len(body) - len(body.translate(None, MARKS)) > MOST_MARKS:
                    raise ValueError("a request has too many values; send fewer, and images as base64")
                return {"type": "http.request", "body": body, "more_body": False}
        raise ValueError(f"a request may be {self.size >> 20} MiB large; send smaller images")
