"""Which names a server answers to: a web page elsewhere must not talk to it through a visitor's browser.

A browser sends the name it looked up as Host, and the page's own origin as Origin. A page can have its name resolve to this
machine (DNS rebinding), but it cannot make a browser send an IP address or localhost as Host in its place. As Origin it can:
it may lie at an IP address itself. So an origin is ours where it is local, allowed, or the host that the request is for.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from fromage.serving.refusals import refusal

VARIABLE = "FROMAGE_ALLOWED_HOSTS"  # further names, with commas between, such as those of a reverse proxy


class HostGuard:
    """ASGI middleware: 403 where Host or Origin is neither local nor allowed. IP addresses pass as Host."""

    def __init__(self, app: Any, host: str, origins: Collection[str] = ()) -> None:
        """host: the name or address that the server listens at; it is allowed. origins: of pages that are let in too."""
        self.app, self.origins = app, {origin.encode() for origin in origins}
        named = os.environ.get(VARIABLE, "").split(",")
        self.allowed = {name.strip().lower() for name in (host, socket.gethostname(), "localhost", *named)} - {""}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] in ("http", "websocket"):
            headers = dict(scope["headers"])
            host = _name(f"//{headers.get(b'host', b'').decode('latin-1')}")
            origin = _name(headers[b"origin"].decode("latin-1")) if b"origin" in headers else host
            address = _address(host) is not None
            let_in = headers.get(b"origin", b"").lower() in self.origins
            if not (address or self._known(host)):
                return await self._refuse(scope, receive, send, f"this name is not allowed; name it in {VARIABLE}")
            if not (let_in or origin == host or self._known(origin)):
                told = f"pages of this origin are not let in; name it by --cors, or its host in {VARIABLE}"
                return await self._refuse(scope, receive, send, told)
        return await self.app(scope, receive, send)

    def _known(self, name: str) -> bool:
        address = _address(name)
        return name in self.allowed or name.endswith(".localhost") or (address is not None and address.is_loopback)

    async def _refuse(self, scope: Any, receive: Any, send: Any, told: str) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        return await refusal(scope["path"], 403, told)(scope, receive, send)


def _name(address: str) -> str:
    """The host of an address, '' where there is none."""
    try:
        return (urlsplit(address).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
