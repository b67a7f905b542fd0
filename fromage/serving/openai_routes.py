"""OpenAI's protocol, so that its clients work unmodified: /v1/chat/completions, /v1/embeddings and /v1/models."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from fromage.errors import UserError
from fromage.generation.generate import Answer
from fromage.serving.model_worker import Usage
from fromage.serving.openai_replies import (
    ChatCompletion,
    Choice,
    Embedding,
    Embeddings,
    OpenAIModel,
    OpenAIModels,
    OpenAIProblem,
    OpenAIUsage,
    Said,
    found_part,
    packed,
)
from fromage.serving.openai_requests import as_chat, as_inputs
from fromage.serving.openai_schema import (
    MOST_TOKENS,
    NAME,
    ChatCompletionRequest,
    EmbeddingRequest,
    ImageUrlPart,
    ModelName,
    OpenAIText,
)
from fromage.serving.refusals import OPENAI, openai_error
from fromage.serving.request_handler import RequestHandler
from fromage.serving.routes import REFUSALS, Piece, attended, begun, broken_off, event_stream

router = APIRouter(prefix=OPENAI.rstrip("/"))
STARTED = int(time.time())


class UnknownModel(UserError):
    """A name of none of the server's models."""


OPENAI_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIProblem, "description": told["description"]}
    for status, told in REFUSALS.items()
    if status != 422
} | {404: {"model": OpenAIProblem, "description": "The server has no such model."}}
CHUNKS = {"text/event-stream": {"schema": {"type": "object"}, "example": 'data: {"choices": []}\n\ndata: [DONE]\n\n'}}


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    responses={200: {"content": CHUNKS, "description": "The answer, or with stream its chunks"}, **OPENAI_REFUSALS},
)
async def chat_completions(body: ChatCompletionRequest, request: Request) -> Any:
    """Answer a conversation, with words and with images of the index.

    `content` of the answer is a string; where images were retrieved it is a list of `text` and `image_url` parts, in order.
    In a stream `delta.content` is a string where there is text; images come as `delta.images`, a list of `image_url` parts.
    """
    handler, own = _handler(request, body.model), _own(request)
    fits = (handler.model.lm.max_length or 2 * MOST_TOKENS) // 2  # of a conversation, older turns give way
    asked = as_chat(body, own, min(MOST_TOKENS, fits))
    about: dict[str, Any] = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time())}
    if not body.stream:
        answer, usage = await attended(request, handler.answer(asked), handler.capacity.timeout)
        choice = Choice.model_construct(
            message=Said.model_construct(content=_content(handler, answer, own)), finish_reason=_end(usage)
        )
        made = ChatCompletion.model_construct(**about, choices=[choice], usage=_spent(usage))
        return Response(made.model_dump_json(), media_type="application/json")
    wants_usage = bool(body.stream_options and body.stream_options.include_usage)
    chunks = _chunks(handler, about, own, wants_usage, await begun(request, asked))
    return event_stream(chunks)


@router.post("/embeddings", responses=OPENAI_REFUSALS)
async def embeddings(body: EmbeddingRequest, request: Request) -> Embeddings:
    """Embed texts, images, and lists of both in the space that images are searched in."""
    handler = _handler(request, body.model)
    if body.dimensions not in (None, handler.model.q):
        raise UserError(f"dimensions {body.dimensions}: the model has {handler.model.q}; leave dimensions out")
    contents = as_inputs(body, _own(request))
    rows, tokens = await attended(request, handler.embed(contents), handler.capacity.timeout)  # (B, q)
    data = [
        Embedding(index=i, embedding=packed(row) if body.encoding_format == "base64" else row.tolist())
        for i, row in enumerate(rows)
    ]
    return Embeddings(data=data, usage=OpenAIUsage.of(tokens))


@router.get("/models", responses={401: OPENAI_REFUSALS[401]})
async def models() -> OpenAIModels:
    """The models that the server has: one."""
    return OpenAIModels(data=[OpenAIModel(created=STARTED)])


@router.get("/models/{name}", responses={status: OPENAI_REFUSALS[status] for status in (400, 401, 404)})
async def model(name: ModelName, request: Request) -> OpenAIModel:
    """A model by its name."""
    _handler(request, name)
    return OpenAIModel(created=STARTED)


def _handler(request: Request, name: str) -> RequestHandler:
    if name != NAME:
        raise UnknownModel(f"model {name[:60]!r}: the server has none of this name; name {NAME!r}")
    return request.app.state.handler


def _own(request: Request) -> str:
    """What the addresses of this server's images begin with."""
    return f"{request.base_url}images/"


def _spent(usage: Usage) -> OpenAIUsage:
    return OpenAIUsage.of(usage.prompt, usage.answer)


def _end(usage: Usage) -> Any:
    return "length" if usage.cut else "stop"


def _content(handler: RequestHandler, answer: Answer, own: str) -> str | list[OpenAIText | ImageUrlPart]:
    """An answer as content: a string where it has no images."""
    content: list[OpenAIText | ImageUrlPart] = []
    for piece in answer.parts:
        if isinstance(piece, str):
            content.append(OpenAIText(type="text", text=piece))
        else:
            content += [found_part(found, own) for found in handler.found(piece)]
    texts = [part.text for part in content if isinstance(part, OpenAIText)]
    return "".join(texts) if len(texts) == len(content) else content


async def _chunks(
    handler: RequestHandler, about: dict[str, Any], own: str, wants_usage: bool, pieces: AsyncIterator[Piece]
) -> AsyncIterator[str]:
    """An answer as server-sent events."""
    about = about | {"object": "chat.completion.chunk", "model": NAME}

    def chunk(delta: dict[str, Any], end: str | None = None) -> str:
        return _event(about | {"choices": [{"index": 0, "delta": delta, "finish_reason": end, "logprobs": None}]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for piece in pieces:
            if isinstance(piece, str):
                yield chunk({"content": piece})
            elif isinstance(piece, Usage):
                yield chunk({}, _end(piece))
                if wants_usage:
                    yield _event(about | {"choices": [], "usage": _plain(_spent(piece))})
            elif images := [_plain(found_part(found, own)) for found in handler.found(piece)]:
                yield chunk({"images": images})
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield _event({"error": openai_error(*broken_off(error))})


def _plain(made: BaseModel) -> dict[str, Any]:
    return made.model_dump(mode="json")


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
