"""Limits of HTTP requests: their size, the time in which they must arrive, and the number of open ones."""

from __future__ import annotations

import asyncio

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY = 32 << 20  # bytes of a request
BUSY = "too many requests wait; try later"


class BodyLimit:
    """ASGI middleware that reads the body of a POST before it passes the request on, or refuses it by 429, 413 or 408.

    Bodies of other requests are never read.
    """

    def __init__(self, app: ASGIApp, requests: int, seconds: float, size: int = BODY) -> None:
        """requests: maximum number of open requests. seconds: time limit of a whole body. size: maximum size in bytes."""
        self.app, self.free, self.seconds, self.size = app, requests, seconds, size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope.get("method") != "POST":
            return await self.app(scope, receive, send)
        if not self.free:
            return await JSONResponse({"detail": BUSY}, 429, {"Retry-After": "1"})(scope, receive, send)
        self.free -= 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self.free += 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.seconds):
                body = await self._read(scope, receive)
        except (TimeoutError, ValueError) as error:
            status, detail = (
                (413, str(error)) if isinstance(error, ValueError) else (408, "the request took too long to arrive")
            )
            return await JSONResponse({"detail": detail}, status)(scope, receive, send)
        rest = iter([body])

        async def replay() -> Message:
            return next(rest, None) or await receive()

        return await self.app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> Message:
        """The body as one message, or the message that the client has left. Raises ValueError for too large a body."""
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
                return {"type": "http.request", "body": b"".join(parts), "more_body": False}
        raise ValueError(f"a request may be {self.size >> 20} MiB large; send smaller images")
