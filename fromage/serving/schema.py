"""Schema of the HTTP server: its requests and replies, with their limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from fromage.generation.options import DEFAULTS, HELP, LIMITS, STOP_LENGTH, STOPS, Decoding, is_whole, served
from fromage.retrieval.where import MOST

CHARACTERS, IMAGES, URLS, PARTS, MESSAGES = 1 << 15, 32, 4, 64, 64  # of a request
MOST_HITS = 50

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"  # red

Words = Annotated[str, Field(max_length=CHARACTERS)]
Images = Annotated[
    bool,
    Field(
        description="Send the images found, not only their ids; of those that have gone the next best takes the place.",
        validation_alias=AliasChoices("images", "pictures"),  # its name before version 0.2
    ),
]
ImageId = Annotated[str, Field(pattern="^[0-9a-f]{16}$", description="Names an image of the index.")]


class Strict(BaseModel):
    """A request, or part of one: unknown fields are refused, and so are numbers in quotes."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, value: Any) -> Any:
        """One fault for all unknown fields: pydantic makes one for each, of which a request may hold a million."""
        if isinstance(value, dict) and (unknown := value.keys() - cls.model_fields.keys() - {"pictures"}):
            raise PydanticCustomError("extra_forbidden", "unknown field {name}", {"name": repr(next(iter(unknown)))[:60]})
        return value


class Text(Strict):
    """Text. It is never read as a path, an address or a special token."""

    type: Literal["text"] = "text"
    text: Words


class ImagePart(Strict):
    """An image within the request: JPEG, PNG, WebP, BMP or GIF."""

    type: Literal["image", "picture"]  # picture: before version 0.2
    data: Annotated[str, Field(description="The bytes of the file, in base64.", examples=[PIXEL])]


class Address(Strict):
    """An image on the web, which the server fetches; addresses in private networks are refused."""

    type: Literal["url"]
    url: Annotated[str, Field(max_length=2048, examples=["https://images.example/cat.jpg"])]


class FoundImage(BaseModel):
    """An image of the index. A request that sends it back needs the id alone."""

    model_config = ConfigDict(allow_inf_nan=False)

    id: ImageId
    rank: Annotated[
        int, Field(ge=1, description="1 is the best; missing ranks are images that can no longer be opened.")
    ] = 1
    score: Annotated[float, Field(description="Cosine with what was searched for.")] = 0.0
    caption: str = ""
    name: Annotated[str, Field(description="Its file name, without folders.")] = ""
    key: Annotated[str, Field(description="Its key within a shard, else its file name without the suffix.")] = ""
    metadata: Annotated[dict[str, Any], Field(description="What the shard's JSON and the index's table say of it.")] = {}
    url: Annotated[str | None, Field(description="Its address, if the index is one of images on the web.")] = None
    image: Annotated[str | None, Field(description="A small JPEG of it in base64, if asked for.")] = None


class RetrievedPart(Strict):
    """The images retrieved for a [RET] of an answer."""

    type: Literal["images", "pictures"] = "images"  # pictures: before version 0.2
    hits: Annotated[list[FoundImage], Field(max_length=IMAGES)]


ContentPart = Annotated[Text | ImagePart | Address | RetrievedPart, Field(discriminator="type")]
Content = Annotated[
    Words | Annotated[list[ContentPart], Field(max_length=PARTS)],
    Field(description="Words, or parts in the order in which they are read: words and images."),
]


def parts(content: str | Sequence[Any]) -> list[Any]:
    """The content as a list of parts."""
    return [Text(text=content)] if isinstance(content, str) else list(content)


def check_said(content: str | Sequence[Any]) -> None:
    """Raise ValueError for a content without text and images."""
    if all(isinstance(part, Text) and not part.text.strip() for part in parts(content)):
        raise ValueError("there is nothing in it; give some words or an image")


def check_size(contents: Iterable[str | Sequence[Any]], characters: int = CHARACTERS) -> None:
    """Raise ValueError if the contents exceed the limits of a request. characters: how many they may have in all."""
    listed = [part for content in contents for part in parts(content)]
    shown = sum(len(part.hits) if isinstance(part, RetrievedPart) else not isinstance(part, Text) for part in listed)
    for count, limit, what in (
        (sum(len(part.text) for part in listed if isinstance(part, Text)), characters, "characters"),
        (shown, IMAGES, "images"),
        (sum(isinstance(part, Address) for part in listed), URLS, "addresses"),
    ):
        if count > limit:
            raise ValueError(f"a request may hold {limit} {what} in all, not {count}")


class Message(Strict):
    """One side's words and images. The message of a reply may be sent back as it came."""

    role: Literal["system", "user", "assistant"]
    content: Content


class _DecodingOptions(Strict):
    """Decoding options, where they differ from those the server was started with. Requests with equal ones form a batch."""

    def over(self, decoding: Decoding) -> Decoding:
        """The server's options with those of the request. Raises UserError for options that contradict each other."""
        return replace(decoding, **self.model_dump(exclude_unset=True))


def _field(name: str) -> tuple[Any, Any]:
    """Type and default of a field of DecodingOptions."""
    kind: Any = int if is_whole(name) else float
    (least, most), default = served(name), DEFAULTS[name]
    return Annotated[kind | None if default is None else kind, Field(ge=least, le=most, description=HELP[name])], default


StopText = Annotated[str, Field(min_length=1, max_length=STOP_LENGTH)]
Stop = Annotated[
    list[StopText],
    Field(max_length=STOPS, description="Texts at which the answer ends, besides those of the server's style."),
]
if TYPE_CHECKING:
    DecodingOptions = _DecodingOptions
else:
    DecodingOptions = create_model(
        "DecodingOptions",
        __base__=_DecodingOptions,
        __doc__=_DecodingOptions.__doc__,
        __module__=__name__,
        **{name: _field(name) for name, limits in LIMITS.items() if limits.served},
        end_at_image=(bool, Field(False, description=HELP["end_at_image"])),
        stop=(Stop, []),
    )


SAID: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "a red star"}, {"type": "image", "data": PIXEL}]}]


class ChatRequest(Strict):
    """A conversation so far. The server stores no conversations: each request contains all messages.

    An optional system message comes first; then user and assistant alternate, and the last message is the user's.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [{"messages": SAID, "decoding": {"ret_bias": 10}}]})

    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES)]
    decoding: DecodingOptions = DecodingOptions()
    images: Images = False
    stream: Annotated[bool, Field(description="Send the answer as it is decoded, as server-sent events.")] = False

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        check_size(message.content for message in self.messages)
        turns = [message.role for message in self.messages[self.messages[0].role == "system" :]]
        if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            raise ValueError("messages are: system or not, then user and assistant in turn, and a user's at the end")
        check_said(self.messages[-1].content)
        return self


class ChatReply(BaseModel):
    """The answer, ready to be appended to the messages of the next request."""

    message: Message


class SearchRequest(Strict):
    """A search by text, by an image, or by both in the given order."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": SAID[0]["content"], "k": 3}]})

    query: Content
    k: Annotated[int, Field(ge=1, le=MOST_HITS, description="Images to find; fewer come if the index has fewer.")] = 5
    where: Annotated[
        str,
        Field(
            max_length=MOST,
            description="Only images whose metadata fit, such as `year >= 2019 and place = 'Rome'`; empty for all.",
        ),
    ] = ""
    images: Images = False

    @model_validator(mode="after")
    def _check(self) -> SearchRequest:
        check_size([self.query])
        check_said(self.query)
        return self


class SearchReply(BaseModel):
    """The images found, best first."""

    hits: list[FoundImage]


class Health(BaseModel):
    """The state of the server."""

    status: Literal["ok"] = "ok"
    images: Annotated[int, Field(description="In the index.")]
    waiting: Annotated[int, Field(description="Requests in the queue.")]


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str


class Fault(BaseModel):
    """An error at one place of a request."""

    loc: list[str | int]
    msg: str
    type: str


class Faults(BaseModel):
    """Errors in the form of a request."""

    detail: list[Fault]
