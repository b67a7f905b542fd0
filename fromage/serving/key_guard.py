"""Bearer tokens: requests without one of the server's keys are refused."""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from fromage.serving.refusals import refusal

OPEN = re.compile(r"/|/healthz|/docs|/openapi\.json|/static-offline-docs/.*")  # what needs no key: it says nothing secret


class KeyGuard:
    """ASGI middleware: 401 for a request without `Authorization: Bearer KEY`, except for what `OPEN` names.

    Digests are compared in constant time, so that neither a key nor its length can be found by the clock.
    """

    def __init__(self, app: Any, keys: Sequence[str]) -> None:
        self.app, self.digests = app, [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and OPEN.fullmatch(scope["path"])) or self._known(scope):
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        told = "the key is missing or wrong; send the header Authorization: Bearer KEY"
        return await refusal(scope["path"], 401, told, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _known(self, scope: Any) -> bool:
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = sent[0].partition(b" ") if len(sent) == 1 else (b"", b"", b"")
        digest = sha256(key.strip()).digest()
        return sum([hmac.compare_digest(digest, known) for known in self.digests]) > 0 and scheme.lower() == b"bearer"
