"""Errors that nobody foresaw: logged, and answered as other refusals are."""

from __future__ import annotations

import logging
from typing import Any

from fromage.serving.refusals import refusal
from fromage.serving.routes import ClientGone, status_of

log = logging.getLogger("uvicorn.error")


class ErrorGuard:
    """ASGI middleware: 500 where an exception ends a request before its answer begins; none where the client has left."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI interface."""
        begun = scope["type"] != "http"

        async def seen(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, seen)
        except ClientGone:
            return
        except Exception as error:
            if begun:
                raise
            log.exception("a request failed")
            await refusal(scope["path"], *status_of(error))(scope, receive, send)
