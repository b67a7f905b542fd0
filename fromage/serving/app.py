"""FROMAGe over HTTP: conversations and searches for programs.

One thread owns the model (fromage.serving.batching). Waiting searches are answered as a batch, and so are conversations with
the same decoding options; a streamed conversation is answered alone while others wait. Other threads decode and fetch
images, before a request enters the queue and after it has left it.

    with TestClient(create_app(model, index)) as client:
        client.post("/search", json={"query": "a red star"}).json()["hits"]
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fromage.distribution import pip_install
from fromage.errors import UserError
from fromage.generation.preset import Preset, read_preset
from fromage.models.fromage import Fromage
from fromage.retrieval.base import ImageIndex
from fromage.serving.batching import Capacity

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import RedirectResponse
    from fastapi_offline import FastAPIOffline

    from fromage.serving.body_limit import BodyLimit
    from fromage.serving.connections import address, guarded, open_port
    from fromage.serving.request_handler import RequestHandler
    from fromage.serving.routes import STATUS, router, status_of
except ImportError as error:
    raise UserError(f"the server needs {error.name}: {pip_install('serve')}") from error

FAULTS = 8  # of a malformed request that are reported
DOCS = "/docs"  # the page that says what the server can do


def serve(
    model: Fromage,
    index: ImageIndex | None,
    style: str | None,
    host: str,
    port: int,
    capacity: Capacity | None = None,
    preset: Preset | None = None,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then running requests are finished and waiting ones refused.

    port: 0 for any free port; the address is printed. Raises UserError if the address is not available.
    """
    capacity = capacity or Capacity()
    listening = open_port(host, port)
    app = create_app(model, index, style, capacity, preset)
    config = guarded(app, host, capacity.timeout, timeout_graceful_shutdown=int(capacity.timeout) + 1)
    print(f"{address(host, listening)}  (what it can do: {DOCS})", flush=True)
    with suppress(KeyboardInterrupt):
        _Server(config, app.state.handler).run([listening])


class _Server(uvicorn.Server):
    """Refuses waiting requests as soon as it must stop; uvicorn alone would first answer all of them."""

    def __init__(self, config: uvicorn.Config, handler: RequestHandler) -> None:
        super().__init__(config)
        self.handler = handler

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.handler.batcher.close()
        await super().shutdown(sockets)


def create_app(
    model: Fromage,
    index: ImageIndex | None = None,
    style: str | None = None,
    capacity: Capacity | None = None,
    preset: Preset | None = None,
) -> FastAPI:
    """The application; its model thread runs between startup and shutdown of its lifespan.

    Args:
        index: index of the images to retrieve, built with the same model; None for text-only answers.
        style: prompt style of conversations, see fromage.generation.styles; None: the preset's.
        preset: what requests leave open; None: the model's generation.json.

    Raises:
        UserError: unknown style, or an index built with another model.
    """
    preset = (preset or read_preset(model.generation)).over(style)
    handler = RequestHandler(model, index, preset, capacity or Capacity())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        handler.open()
        yield
        handler.close()
        await asyncio.to_thread(handler.batcher.join)

    about = {"title": "FROMAGe", "description": "Text and images in, text and images out."}
    app = FastAPIOffline(redoc_url=None, lifespan=lifespan, **about)  # its pages need no other server
    app.add_api_route("/", lambda: RedirectResponse(DOCS), include_in_schema=False)
    app.state.handler = handler
    app.include_router(router)
    app.add_middleware(BodyLimit, requests=handler.capacity.requests, seconds=handler.capacity.timeout)
    app.add_exception_handler(RequestValidationError, _malformed)
    for kind in STATUS:
        app.add_exception_handler(kind, _refused)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    status, detail = status_of(error)
    return _json({"detail": detail}, status, {"Retry-After": "1"} if status in (429, 503) else None)


async def _malformed(request: Request, error: Any) -> Response:
    """The first faults, without the input itself, which may be large, and no JSON."""
    faults = [{key: fault[key] for key in ("loc", "msg", "type")} for fault in error.errors()[:FAULTS]]
    for fault in faults:
        fault["msg"] = fault["msg"].removeprefix("Value error, ")  # pydantic's, in front of what a check of ours says
    return _json({"detail": faults}, 422)


def _json(content: Any, status: int, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII, which can contain surrogates."""
    return Response(json.dumps(content), status, headers, "application/json")
