"""What keeps the web demo to itself: its page loads nothing from elsewhere, its server fetches nothing for anyone."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"


class GuardedBlocks(gr.Blocks):
    """Takes uploaded files only. Gradio itself refuses paths of this machine, but would fetch web addresses."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        """Refuse a call before Gradio looks for its files."""
        super().validate_inputs(block_fn, inputs)
        if '"path": "http' in json.dumps(inputs):  # within a text the quotes would be escaped
            raise gr.Error("send the picture itself, not its address")


class Guard:
    """ASGI middleware: tells the browser to load nothing from elsewhere, and refuses paths that hold an address."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY)]
            await send(message)

        if "://" in scope.get("path", ""):
            await send({"type": "http.response.start", "status": 403})
            await send({"type": "http.response.body"})
        else:
            await self.app(scope, receive, guarded)
