"""FROMAGe over HTTP: conversations and searches for programs.

One thread owns the model (fromage.serving.batching). Waiting searches are answered as a batch, between the tokens of an
answer too, and so are conversations with the same decoding options; a streamed conversation is answered alone while others
wait. Other threads decode and fetch images, before a request enters the queue and after it has left it.

    with TestClient(create_app(model, index)) as client:
        client.post("/search", json={"query": "a red star"}).json()["hits"]
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fromage.distribution import pip_install
from fromage.errors import UserError
from fromage.generation.preset import Preset, read_preset
from fromage.models.fromage import Fromage
from fromage.retrieval.base import ImageIndex
from fromage.serving.access import EVERYBODY, Access
from fromage.serving.batching import Capacity

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import RedirectResponse
    from fastapi.routing import APIRoute
    from fastapi.security import HTTPBearer
    from fastapi_offline import FastAPIOffline
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware

    from fromage.serving.body_limit import BodyLimit
    from fromage.serving.connections import address, guarded, open_port
    from fromage.serving.error_guard import ErrorGuard
    from fromage.serving.key_guard import KeyGuard
    from fromage.serving.metrics import Measured
    from fromage.serving.openai_routes import UnknownModel
    from fromage.serving.openai_routes import router as openai_router
    from fromage.serving.refusals import OPENAI, refusal
    from fromage.serving.request_handler import RequestHandler
    from fromage.serving.routes import STATUS, router, status_of
except ImportError as error:
    raise UserError(f"the server needs {error.name}: {pip_install('serve')}") from error

FAULTS = 8  # of a malformed request that are reported
DOCS = "/docs"  # the page that says what the server can do


def serve(
    model: Fromage,
    index: ImageIndex | None,
    preset: Preset,
    host: str,
    port: int,
    capacity: Capacity | None = None,
    access: Access = EVERYBODY,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then running requests are finished and waiting ones refused.

    port: 0 for any free port; the address is printed. Raises UserError if the address is not available.
    """
    capacity = capacity or Capacity()
    listening = open_port(host, port)
    app = create_app(model, index, preset, capacity, access)
    config = guarded(app, host, capacity.timeout, access.origins, timeout_graceful_shutdown=int(capacity.timeout) + 1)
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
    preset: Preset | None = None,
    capacity: Capacity | None = None,
    access: Access = EVERYBODY,
) -> FastAPI:
    """The application; its model thread runs between startup and shutdown of its lifespan.

    Args:
        index: index of the images to retrieve, built with the same model; None for text-only answers.
        preset: what requests leave open, and the style of prompts; None: the model's generation.json.
        access: keys that requests must have, and origins of web pages that may read the answers.

    Raises:
        UserError: unknown style, or an index built with another model.
    """
    handler = RequestHandler(model, index, preset or read_preset(model.generation), capacity or Capacity())

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
    asks = [Depends(HTTPBearer(auto_error=False))] if access.keys else []  # a form for the key in the docs
    for routes in (router, openai_router):
        app.include_router(routes, dependencies=asks)
    app.add_middleware(BodyLimit, requests=handler.capacity.requests, seconds=handler.capacity.timeout)
    if access.keys:
        app.add_middleware(KeyGuard, keys=access.keys)
    app.add_middleware(ErrorGuard)
    if access.origins:
        app.add_middleware(CORSMiddleware, allow_origins=access.origins, allow_methods=["GET", "POST"],
                           allow_headers=["*"], expose_headers=["Retry-After"])  # fmt: skip
    paths = [route.path for routes in (router, openai_router) for route in routes.routes if isinstance(route, APIRoute)]
    app.add_middleware(Measured, metrics=handler.metrics, paths=paths)  # the outermost
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _refused)
    for kind in STATUS:
        app.add_exception_handler(kind, _refused)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return refusal(request.url.path, error.status_code, error.detail, error.headers)
    status, detail = status_of(error)
    status = 404 if isinstance(error, UnknownModel) else status
    return refusal(request.url.path, status, detail, {"Retry-After": "1"} if status in (429, 503) else None)


async def _malformed(request: Request, error: Any) -> Response:
    """The first faults, without the input itself, which may be large, and no JSON."""
    faults = [{key: fault[key] for key in ("loc", "msg", "type")} for fault in error.errors()[:FAULTS]]
    for fault in faults:
        fault["msg"] = fault["msg"].removeprefix("Value error, ")  # pydantic's, in front of what a check of ours says
    if not request.url.path.startswith(OPENAI):
        return refusal(request.url.path, 422, faults)
    named = [str(name) for name in faults[0]["loc"][1:] if isinstance(name, int) or name.isidentifier()]  # not pydantic's
    where = ".".join(named)[:200]  # own names of types
    return refusal(request.url.path, 400, f"{where}: {faults[0]['msg']}" if where else faults[0]["msg"], param=where or None)
