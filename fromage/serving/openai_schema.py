"""Schema of requests in OpenAI's protocol, as this server speaks it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from fromage.checks import ADDRESSES
from fromage.generation.options import served
from fromage.serving.schema import (
    MESSAGES,
    PARTS,
    PIXEL,
    DecodingOptions,
    FoundImage,
    Images,
    Stop,
    StopText,
    Strict,
    Words,
)

NAME = "fromage"  # of the one model that a server has
INPUTS = 128  # of a request for embeddings
MOST_TOKENS: int = served("max_new_tokens")[1]  # of an answer
DATA = re.compile(r"data:image/[\w.+-]+;base64,")

ModelName = Annotated[str, Field(max_length=256, description="A name of /v1/models.", json_schema_extra={"enum": [NAME]})]
Nothing = Annotated[list[Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]
NotRead = Annotated[str | None, Field(max_length=256, description="Not read.")]


class Lenient(Strict):
    """Unknown fields that ask for nothing (null, {}, []) are left out; others are refused."""

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: said for name, said in value.items() if name in cls.model_fields or said not in (None, {}, [])}


def _image_address(url: str) -> str:
    if not DATA.match(url) and not (url.startswith(ADDRESSES) and len(url) <= 2048):
        raise ValueError("an image is data:image/TYPE;base64,DATA, or an http(s) address of up to 2048 characters")
    return url


class ImageUrl(Strict):
    """Where an image is."""

    url: Annotated[
        str,
        Field(description="data:image/png;base64,..., or an address, which the server fetches.", examples=[PIXEL]),
        Field(json_schema_extra={"pattern": r"^(https?://[ -~]{1,2000}|data:image/[\w.+-]+;base64,[A-Za-z0-9+/=]*)$"}),
        AfterValidator(_image_address),
    ]
    detail: Literal["auto", "low", "high"] | None = None


class ImageUrlPart(Strict):
    """An image within the request, on the web, or found before by this server (`hit`)."""

    type: Literal["image_url"]
    image_url: ImageUrl
    hit: Annotated[FoundImage | None, Field(description="What this server said of an image that it found.")] = None


class OpenAIText(Strict):
    """Text. It is never read as a path, an address or a special token."""

    type: Literal["text"]
    text: Words


OpenAIPart = Annotated[OpenAIText | ImageUrlPart, Field(discriminator="type")]
TEXT, PARTS_OF, OBJECT = "a text", "its parts", "an object"  # tags; not identifiers, so that no fault's place shows them


def _kind(value: Any) -> str:
    return TEXT if isinstance(value, str) else PARTS_OF if isinstance(value, list) else OBJECT


def _by_kind(wanted: str) -> Discriminator:
    """One fault, of the kind that was given, not one of each."""
    return Discriminator(_kind, custom_error_type="kind", custom_error_message=f"give {wanted}")


TaggedText = Annotated[Words, Tag(TEXT)]
TaggedParts = Annotated[list[OpenAIPart], Field(min_length=1, max_length=PARTS), Tag(PARTS_OF)]
OpenAIContent = Annotated[TaggedText | TaggedParts, _by_kind("a text or a list of parts")]


class OpenAIMessage(Lenient):
    """One side's words and images. The message of a reply may be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: OpenAIContent | None = None
    name: NotRead = None
    refusal: None = None
    annotations: Nothing | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class PlainText(Strict):
    """The only form of answers."""

    type: Literal["text"]


SAID: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "a red star"},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}]}]  # fmt: skip


class ChatCompletionRequest(Lenient):
    """A conversation so far. Adjacent messages of one side are read as one; a system message stands in front.

    Fields of OpenAI's that this server cannot honour are refused unless they ask for nothing.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": NAME, "messages": SAID, "max_tokens": 8}]})

    model: ModelName
    messages: Annotated[list[OpenAIMessage], Field(min_length=1, max_length=MESSAGES)]
    max_completion_tokens: Annotated[
        int | None,
        Field(
            ge=1, description=f"Length of the answer, in tokens; at most {MOST_TOKENS}, and half of what the model reads."
        ),
    ] = None
    max_tokens: Annotated[int | None, Field(ge=1, description="The old name of max_completion_tokens.")] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    seed: Annotated[int | None, Field(description="Modulo 2 ** 32.")] = None
    stop: StopText | Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logprobs: Literal[False] | None = None
    response_format: PlainText | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    function_call: Literal["none", "auto"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    user: NotRead = None
    safety_identifier: NotRead = None
    prompt_cache_key: NotRead = None
    store: Literal[False] | None = None
    metadata: Annotated[dict[str, Any] | None, Field(max_length=16, description="Not read.")] = None
    decoding: Annotated[DecodingOptions, Field(description="Options of this server that OpenAI's protocol has not.")] = (
        DecodingOptions()
    )
    images: Images = False


class EmbeddingInput(Strict):
    """A text, an image, or an image with a text after it."""

    text: Words | None = None
    image: Annotated[str | None, Field(description="A data: URL, the file's bytes in base64, or an address.")] = None

    @model_validator(mode="after")
    def _check(self) -> EmbeddingInput:
        if self.text is None and self.image is None:
            raise ValueError("an input holds a text, an image, or both")
        return self


class EmbeddingRequest(Lenient):
    """Texts and images to embed: `input`, or `messages`, of which all contents are one input."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": NAME, "input": ["a red star", {"image": PIXEL}, SAID[0]["content"]]}]}
    )

    model: ModelName
    input: Annotated[
        Annotated[
            TaggedText
            | Annotated[
                list[
                    Annotated[
                        TaggedText | TaggedParts | Annotated[EmbeddingInput, Tag(OBJECT)],
                        _by_kind("a text, an object with text and image, or a list of content parts; no token ids"),
                    ]
                ],
                Field(min_length=1, max_length=INPUTS),
                Tag(PARTS_OF),
            ],
            _by_kind("a text or a list of inputs"),
        ]
        | None,
        Field(description="A text, or a list of texts, of objects with text and image, and of lists of content parts."),
    ] = None
    messages: Annotated[list[OpenAIMessage] | None, Field(min_length=1, max_length=MESSAGES)] = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int | None, Field(ge=1, description="The width that the model has.")] = None
    user: NotRead = None

    @model_validator(mode="after")
    def _check(self) -> EmbeddingRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give either input or messages")
        return self
