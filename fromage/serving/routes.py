"""The routes of the HTTP server, and their OpenAPI description."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import torch
from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import StreamingResponse

from fromage.errors import OUT_OF_REACH, OutOfReach, UserError
from fromage.generation.generate import Answer
from fromage.generation.retrieved import RetrievedImages
from fromage.serving.batching import Busy, Closed
from fromage.serving.body_limit import BODY, BUSY
from fromage.serving.metrics import MEDIA_TYPE
from fromage.serving.model_worker import Usage
from fromage.serving.request_handler import RequestHandler
from fromage.serving.schema import (
    ChatReply,
    ChatRequest,
    Faults,
    Health,
    ImageId,
    Problem,
    SearchReply,
    SearchRequest,
)

STATUS: dict[type[Exception], tuple[int, str]] = {
    OutOfReach: (503, OUT_OF_REACH),
    UserError: (400, ""),
    Busy: (429, BUSY),
    Closed: (503, "the server is shutting down"),
    MemoryError: (503, "not enough memory; send less at a time"),
    torch.OutOfMemoryError: (503, "not enough memory; send less at a time"),
    TimeoutError: (504, "took too long; ask for less, or try later"),
}
STREAMED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy keeps events, or holds them up
T = TypeVar("T")
Piece = str | RetrievedImages | Usage
log = logging.getLogger("uvicorn.error")
router = APIRouter()

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The request is well-formed, but cannot be answered."},
    401: {"model": Problem, "description": "The server wants a key, and there is none or a wrong one."},
    408: {"model": Problem, "description": "The request took too long to arrive."},
    413: {"model": Problem, "description": f"The request is larger than {BODY >> 20} MiB, or has too many values."},
    422: {"model": Faults, "description": "The request is not of the form described here."},
    429: {"model": Problem, "description": "Too many requests wait; try later."},
    503: {"model": Problem, "description": "The server is shutting down, or short of memory."},
    504: {"model": Problem, "description": "The answer took too long."},
}
EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["text", "images", "done", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
EVENTS = {"text/event-stream": {"schema": EVENT, "example": 'event: text\ndata: {"text": "a red star"}\n\n'}}


class ClientGone(Exception):
    """The client has left before its answer began."""


def status_of(error: Exception) -> tuple[int, str]:
    """HTTP status and message for an exception."""
    for kind, (status, detail) in STATUS.items():
        if isinstance(error, kind):
            return status, detail or str(error)
    return 500, "an error of the server; its log tells more"


@router.post(
    "/chat",
    response_model=ChatReply,
    responses={200: {"content": EVENTS, "description": "The answer, or with stream its events"}, **REFUSALS},
)
async def chat(body: ChatRequest, request: Request) -> Any:
    """Answer a conversation, with words and with images of the index.

    With `stream`, server-sent events: `text` {"text"} and `images` {"hits"} while the answer is decoded, then `done` with
    the reply as without `stream`, or `error` {"detail"}. Closing the connection stops decoding.
    """
    handler: RequestHandler = request.app.state.handler
    if not body.stream:
        return await attended(request, handler.chat(body), handler.capacity.timeout)
    return event_stream(_events(handler, await begun(request, body)))


@router.post("/search", responses=REFUSALS)
async def search(body: SearchRequest, request: Request) -> SearchReply:
    """Find images of the index by words, by an image, or by both."""
    handler: RequestHandler = request.app.state.handler
    return await attended(request, handler.search(body), handler.capacity.timeout)


@router.get("/pictures/{name}", include_in_schema=False)  # its path before version 0.2
@router.get(
    "/images/{name}",
    response_class=Response,
    responses={
        200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}, "description": "The image"},
        404: {"model": Problem, "description": "The index has no such image, or it has gone."},
        **{status: REFUSALS[status] for status in (422, 503, 504)},
    },
)
async def image(name: ImageId, request: Request) -> Response:
    """An image of the index, as JPEG of at most 1024 pixels a side."""
    handler: RequestHandler = request.app.state.handler
    try:
        return Response(await attended(request, handler.image(name), handler.capacity.timeout), media_type="image/jpeg")
    except OutOfReach:
        raise
    except UserError as error:
        raise HTTPException(404, str(error)) from None


@router.get("/healthz", responses={503: REFUSALS[503]})
async def healthz(request: Request) -> Health:
    """Whether the server takes requests."""
    handler: RequestHandler = request.app.state.handler
    if handler.batcher.closed:
        raise Closed
    images = 0 if handler.index is None else await asyncio.to_thread(len, handler.index)  # Milvus may take its time
    return Health(images=images, waiting=handler.batcher.waiting)


@router.get("/metrics", response_class=Response, responses={200: {"content": {MEDIA_TYPE: {"schema": {"type": "string"}}}}})
async def metrics(request: Request) -> Response:
    """Counts of requests, their times, the queue and tokens, as Prometheus reads them."""
    handler: RequestHandler = request.app.state.handler
    return Response(handler.metrics.page(), headers={"content-type": MEDIA_TYPE})


async def attended(request: Request, work: Coroutine[Any, Any, T], seconds: float) -> T:
    """The result of some work; it is cancelled at the time limit (TimeoutError), or when the client leaves (ClientGone)."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone if gone.done() else TimeoutError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def begun(request: Request, body: ChatRequest) -> AsyncIterator[Piece]:
    """The pieces of an answer that has its first one: what goes wrong before it is raised here, as without a stream.

    Each piece is waited for until the time limit of the whole answer; then the iterator raises TimeoutError.
    """
    handler: RequestHandler = request.app.state.handler
    ends = asyncio.get_running_loop().time() + handler.capacity.timeout
    pieces = handler.pieces(body)

    async def following() -> Piece | None:
        async with asyncio.timeout_at(ends):
            return await anext(pieces, None)

    first = await attended(request, following(), handler.capacity.timeout)

    async def all_pieces() -> AsyncIterator[Piece]:
        piece = first
        while piece is not None:
            yield piece
            piece = await following()

    return all_pieces()


def event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    """A response of server-sent events."""
    return StreamingResponse(events, media_type="text/event-stream", headers=STREAMED)


async def _events(handler: RequestHandler, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
    """An answer as server-sent events."""
    said: list[str | RetrievedImages] = []
    try:
        async for piece in pieces:
            if not isinstance(piece, Usage):
                said.append(piece)
                name = "text" if isinstance(piece, str) else "images"
                yield _event(name, handler.part(piece).model_dump_json(exclude={"type"}))
        yield _event("done", handler.reply(Answer.of(said)).model_dump_json())
    except Exception as error:
        yield _event("error", json.dumps({"detail": broken_off(error)[1]}))


def broken_off(error: Exception) -> tuple[int, str]:
    """HTTP status and message for what ended a stream; what nobody expects is logged."""
    if not isinstance(error, tuple(STATUS)):
        log.exception("a stream broke off")
    return status_of(error)


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"
