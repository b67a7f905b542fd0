"""Requests in OpenAI's protocol as requests of ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from pydantic import ValidationError

from fromage.checks import ADDRESSES
from fromage.errors import UserError
from fromage.generation.options import LIMITS, served
from fromage.serving.openai_schema import (
    DATA,
    ChatCompletionRequest,
    EmbeddingInput,
    EmbeddingRequest,
    OpenAIMessage,
    OpenAIText,
)
from fromage.serving.schema import (
    CHARACTERS,
    Address,
    ChatRequest,
    DecodingOptions,
    FoundImage,
    ImagePart,
    Message,
    RetrievedPart,
    Text,
    check_said,
    check_size,
)

LONGEST = 4 * CHARACTERS  # characters of all inputs of a request for embeddings


def as_chat(request: ChatCompletionRequest, own: str, longest: int) -> ChatRequest:
    """A request for a chat completion as one of /chat. Raises UserError if it is none.

    own: what addresses of this server's images begin with. longest: tokens of an answer, where more are asked for.
    """
    given = _sampling(request)
    given["max_new_tokens"] = min(request.max_completion_tokens or request.max_tokens or 0, longest) or None
    given["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop
    decoding = request.decoding.model_dump(exclude_unset=True) | {k: v for k, v in given.items() if v is not None}
    with _ours():
        messages = _turns(request.messages, own)
        return ChatRequest(messages=messages, decoding=DecodingOptions(**decoding), images=request.images)


def as_inputs(request: EmbeddingRequest, own: str) -> list[list[Any]]:
    """The parts of each input of a request for embeddings. own, errors: as of `as_chat`."""
    listed = request.input if isinstance(request.input, list) else [request.input]
    with _ours():
        inputs = [_together(request.messages, own)] if request.messages else [_embedded(one, own) for one in listed]
    try:
        check_size(inputs, LONGEST)
    except ValueError as error:
        raise UserError(f"{error}; send less at a time") from None
    for number, parts in enumerate(inputs):
        try:
            check_said(parts)
        except ValueError as error:
            raise UserError(f"input {number}: {error}") from None
    return inputs


def _sampling(request: ChatCompletionRequest) -> dict[str, Any]:
    """Options of sampling, those of OpenAI's that ours do not reach replaced by the nearest one that they do."""
    given: dict[str, Any] = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
    if request.temperature is not None and request.temperature < LIMITS["temperature"].least:
        given["temperature"] = 0.0
    if request.top_p is not None:
        given["top_p"] = max(request.top_p, served("top_p")[0])
    if request.seed is not None:
        given["seed"] = request.seed % (served("seed")[1] + 1)
    return given


@contextmanager
def _ours() -> Iterator[None]:
    """Raise UserError where what a request says is none of our requests."""
    try:
        yield
    except ValidationError as error:
        raise UserError(error.errors(include_input=False)[0]["msg"].removeprefix("Value error, ")) from None


def _embedded(one: Any, own: str) -> list[Any]:
    if not isinstance(one, EmbeddingInput):
        return _parts(one, own)
    image = one.image and (one.image if one.image.startswith((*ADDRESSES, "data:")) else _data(one.image))
    return [*([_image(image, None, own)] if image else []), *_parts(one.text, own)]


def _data(encoded: str) -> str:
    return f"data:image/any;base64,{encoded}"


def _turns(messages: Sequence[OpenAIMessage], own: str) -> list[Message]:
    """Messages with one turn for each side at a time."""
    turns: Any = groupby(messages, lambda message: "system" if message.role == "developer" else message.role)
    return [Message(role=role, content=_together(some, own)) for role, some in turns]


def _together(messages: Iterable[OpenAIMessage], own: str) -> list[Any]:
    """The parts of messages of one side, each on a line of its own."""
    out: list[Any] = []
    for message in messages:
        out += [*([Text(text="\n")] if out else []), *_parts(message.content, own)]
    return out


def _parts(content: str | list[Any] | None, own: str) -> list[Any]:
    """Content as parts of ours."""
    if content is None or isinstance(content, str):
        return [Text(text=content)] if content else []
    return [
        Text(text=part.text) if isinstance(part, OpenAIText) else _image(part.image_url.url, part.hit, own)
        for part in content
    ]


def _image(url: str, hit: FoundImage | None, own: str) -> ImagePart | Address | RetrievedPart:
    number = re.fullmatch(re.escape(own) + "([0-9a-f]{16})", url)
    if hit or number:
        return RetrievedPart(hits=[hit or FoundImage(id=number[1])])  # type: ignore[index]
    if url.startswith("data:"):
        if not DATA.match(url):
            raise UserError("an image is data:image/TYPE;base64,DATA, base64 alone, or an http(s) address")
        return ImagePart(type="image", data=url.partition(",")[2])
    return Address(type="url", url=url)
