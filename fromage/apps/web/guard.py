"""Security of the web demo: its page loads nothing from other hosts, and its server fetches no addresses."""

from __future__ import annotations

import json
from math import isfinite
from numbers import Real
from typing import Any

import gradio as gr

from fromage.models.prompts import HALVES

POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"


class GuardedBlocks(gr.Blocks):
    """Accepts uploaded files only: Gradio refuses local paths by itself, but would fetch web addresses.

    It also refuses values that the page cannot send and on which Gradio would fail.
    """

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        """Refuse a call before Gradio reads its files."""
        super().validate_inputs(block_fn, inputs)
        if '"path": "http' in json.dumps(inputs):  # in a text the quotes would be escaped
            raise gr.Error("send the image itself, not its address", print_exception=False)
        for block, value in zip(block_fn.inputs, inputs, strict=False):
            if isinstance(block, gr.Slider) and not (isinstance(value, Real) and isfinite(value)):
                raise gr.Error(f"{block.label} must be a number", print_exception=False)
            if isinstance(block, gr.MultimodalTextbox) and not _is_message(value):
                raise gr.Error("a message is its text and its files", print_exception=False)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(text := value.get("text"), str) and not HALVES.search(text)


class Guard:
    """ASGI middleware: forbids the browser to load from other hosts, and refuses paths that contain an address."""

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
