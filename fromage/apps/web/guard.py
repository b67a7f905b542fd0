"""Security of the web demo: what of Gradio's server can be reached, how much may be sent, and what its page may load."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from typing import Any

import gradio as gr
from starlette.responses import PlainTextResponse

from fromage.apps.web.shelf import Shelf
from fromage.checks import HALVES
from fromage.serving.body_limit import BodyLimit

POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
FILE = {"_type": "gradio.FileData"}  # what Gradio knows a file by
UPLOAD = "/gradio_api/upload"
PATHS = re.compile(  # what the page asks for; Gradio has much more
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)/?|/(assets|static|svelte)/.*|/gradio_api/("
    r"upload|upload_progress|queue/(join|data)|run/predict|cancel|reset/?|startup-events|theme\.css|heartbeat/\w+|file=(?!.*://).*)"
)
STREAMS = {  # replies that stay open, of one address (of all clients, behind a proxy) and of all: a page has one of each
    "/gradio_api/heartbeat/": (32, 128),  # whose client has left; the page works without
    "/gradio_api/queue/data": (64, 192),  # answers while they are decoded
}
OPEN = 64  # POSTs at a time whose bodies are not files, each up to SENT bytes
SENT = 1 << 20
UPLOADS, UPLOADED = 4, 64 << 20  # requests at a time that upload files, and bytes of each
SECONDS = 60.0  # in which what is sent must arrive
LARGEST = 1e300  # number of a slider


class GuardedBlocks(gr.Blocks):
    """Accepts files that were uploaded, and no other path or address, which Gradio would read or fetch.

    It also refuses values that the page cannot send and on which Gradio would fail.
    """

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        """Refuse a call before Gradio reads its files."""
        super().validate_inputs(block_fn, inputs)
        for block, value in zip(block_fn.inputs, inputs, strict=False):
            if isinstance(block, gr.Slider) and not (isinstance(value, int | float) and abs(value) <= LARGEST):
                raise gr.Error(f"{block.label} must be a number", print_exception=False)
            if isinstance(block, gr.Textbox) and not (isinstance(value, str) and not HALVES.search(value)):
                raise gr.Error(f"{block.label} must be a text", print_exception=False)
            if isinstance(block, gr.MultimodalTextbox) and not _is_message(value):
                raise gr.Error("a message is its text and its files", print_exception=False)
            if isinstance(block, gr.MultimodalTextbox) and not all(map(self._is_uploaded, value["files"])):
                why = "an image was not uploaded, or made room for newer ones; add it again"
                raise gr.Error(why, print_exception=False)

    def _is_uploaded(self, file: Any) -> bool:
        return (
            isinstance(file, dict)
            and file.get("meta") == FILE
            and not any(isinstance(value, (dict, list)) for name, value in file.items() if name != "meta")
            and file.get("path") in self.upload_file_set
        )


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(text := value.get("text"), str)
        and not HALVES.search(text)
        and isinstance(value.get("files"), list)
        and not any(isinstance(each, (dict, list)) for name, each in value.items() if name != "files")
    )


class Guard:
    """ASGI middleware: passes on what the page asks for, within limits, and forbids the browser to load from other hosts."""

    def __init__(self, app: Any, shelf: Shelf) -> None:
        self.app, self.uploads = BodyLimit(app, OPEN, SECONDS, SENT), UploadLimit(app, shelf)
        self.streams: Counter[tuple[str, str]] = Counter()  # that are open, by kind and address

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY)]
            await send(message)

        path = scope.get("path", "")
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http" and not PATHS.fullmatch(path):
            await PlainTextResponse("the page does not ask for this", 404)(scope, receive, send)
        elif kind := next((kind for kind in STREAMS if path.startswith(kind)), None):
            await self._stream(kind, scope, receive, guarded)
        else:
            await (self.uploads if path == UPLOAD else self.app)(scope, receive, guarded)

    async def _stream(self, kind: str, scope: Any, receive: Any, send: Any) -> None:
        """Pass on a request whose reply stays open, or refuse it by 429, so that streams do not take all connections."""
        who, (of_one, of_all) = (kind, str((scope.get("client") or ("",))[0])), STREAMS[kind]
        if self.streams[who] >= of_one or sum(n for (of, _), n in self.streams.items() if of == kind) >= of_all:
            return await PlainTextResponse("too many open pages; close one", 429)(scope, receive, send)
        self.streams[who] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.streams[who] -= 1
            self.streams += Counter()  # drops zeros
        return None


class UploadLimit:
    """ASGI middleware: files may be uploaded within limits of size, number and time; older ones make room on the shelf."""

    def __init__(self, app: Any, shelf: Shelf) -> None:
        self.app, self.shelf = app, shelf
        self.sizes: list[tuple[str, int]] = []  # of what is being uploaded, and by whom

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass an upload on, or refuse it by 411, 413, 429 or 408."""
        announced = dict(scope["headers"]).get(b"content-length", b"")
        size = int(announced) if announced.isdigit() else -1
        if size < 0 or size > UPLOADED:
            why = f"files of more than {UPLOADED >> 20} MiB at once; send fewer or smaller images"
            return await PlainTextResponse(why, 411 if size < 0 else 413)(scope, receive, send)
        if len(self.sizes) >= UPLOADS:
            return await PlainTextResponse("too many uploads at once; try again in a moment", 429)(scope, receive, send)
        visitor, reply = str((scope.get("client") or ("",))[0]), _Reply(send)
        self.sizes.append((visitor, size))
        try:
            await asyncio.to_thread(self.shelf.make_room, *self._due(visitor), visitor)
            async with asyncio.timeout(SECONDS):
                await self.app(scope, receive, reply)
            self.shelf.uploaded(visitor, reply.paths())
            await asyncio.to_thread(self.shelf.make_room, 0, 0, visitor)
        except TimeoutError:
            if not reply.begun:
                await PlainTextResponse("the upload took too long", 408)(scope, receive, send)
        finally:
            self.sizes.remove((visitor, size))
        return None

    def _due(self, visitor: str) -> tuple[int, int]:
        """Bytes that are being uploaded by all, and by a visitor."""
        return sum(size for _, size in self.sizes), sum(size for who, size in self.sizes if who == visitor)


class _Reply:
    """Passes a reply on, and keeps a small one."""

    def __init__(self, send: Any) -> None:
        self.send, self.begun, self.body = send, False, b""

    async def __call__(self, message: Any) -> None:
        self.begun = True
        self.body += message.get("body", b"")
        await self.send(message)

    def paths(self) -> list[str]:
        """The paths of uploaded files, of which Gradio sends a list."""
        try:
            listed = json.loads(self.body)
        except ValueError:
            return []
        return [path for path in listed if isinstance(path, str)] if isinstance(listed, list) else []
