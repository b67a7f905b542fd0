"""What the server answers in OpenAI's protocol: completions, embeddings, models, errors."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from fromage.serving.openai_schema import NAME, ImageUrl, ImageUrlPart, OpenAIText
from fromage.serving.schema import FoundImage


class OpenAIUsage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: Annotated[int, Field(description="Of the prompt, k for each image.")]
    completion_tokens: int = 0
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, answer: int = 0) -> OpenAIUsage:
        """The counts with their sum."""
        return cls(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)


class Said(BaseModel):
    """The answer: a text; with images a list of parts."""

    role: Literal["assistant"] = "assistant"
    content: Annotated[
        str | list[OpenAIText | ImageUrlPart],
        Field(description="A string; where images were retrieved a list of text and image_url parts, in order."),
    ]
    refusal: None = None


class Choice(BaseModel):
    """The one answer."""

    index: int = 0
    message: Said
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(BaseModel):
    """An answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str = NAME
    choices: list[Choice]
    usage: OpenAIUsage


class Embedding(BaseModel):
    """The row of one input."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: Annotated[list[float] | str, Field(description="Numbers, or base64 of float32 in little endian.")]


class Embeddings(BaseModel):
    """Rows of the retrieval space, of unit length."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str = NAME
    usage: OpenAIUsage


class OpenAIModel(BaseModel):
    """A model that the server has."""

    id: str = NAME
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fromage"


class OpenAIModels(BaseModel):
    """The models that the server has."""

    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class OpenAIError(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIProblem(BaseModel):
    """Why a request was not answered."""

    error: OpenAIError


def found_part(found: FoundImage, own: str) -> ImageUrlPart:
    """An image that was found, as content: its small JPEG if that was asked for, else its address."""
    url = f"data:image/jpeg;base64,{found.image}" if found.image else found.url or f"{own}{found.id}"
    return ImageUrlPart.model_construct(
        type="image_url", image_url=ImageUrl.model_construct(url=url), hit=found.model_copy(update={"image": None})
    )


def packed(row: Any) -> str:
    """(q,) numbers as base64 of float32 in little endian."""
    return base64.b64encode(row.astype("<f4").tobytes()).decode()
