"""Sessions of the web demo: answers and searches for visitors, and conversations in Gradio's format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import blake2b
from html import escape
from pathlib import Path
from secrets import token_bytes
from threading import Lock
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image
from torch import Tensor

from fromage.apps.web.shelf import shelf_at
from fromage.errors import OUT_OF_REACH, BrokenSample, OutOfReach, UserError
from fromage.generation.chat import Chat, Turn
from fromage.generation.generate import Answer
from fromage.generation.options import is_whole
from fromage.generation.preset import Preset
from fromage.generation.retrieved import RetrievedImages
from fromage.generation.styles import Exchange
from fromage.images.codec import jpeg
from fromage.images.decode_process import decode_apart
from fromage.io import WholeFile
from fromage.models.fromage import Fromage
from fromage.models.prompts import Part, parts_of
from fromage.retrieval.queries import query_rows, read_as
from fromage.retrieval.results import Hit, load_images

if TYPE_CHECKING:
    from fromage.retrieval.base import ImageIndex

MAX_SENT = 8  # images in a message
MAX_TEXT = 20_000  # characters in a message
LARGE = 4096  # maximum side of an uploaded image, in pixels
SIDE = 1024  # maximum side of an image on the page, in pixels
SLIDERS = ("ret_bias", "temperature", "images_per_ret", "max_new_tokens")  # decoding options on the page
MAX_TURNS = 100  # turns kept of a conversation; language models have positions for fewer
MAX_KEPT = 2 << 20  # bytes kept of a conversation, with features of its images
GradioMessage = dict[str, Any]  # Gradio's: role and contents in a conversation, text and files in an input box
SECRET = token_bytes(16)
GONE = "(better ones could not be opened)"  # in place of notes that name paths


@dataclass
class PageTurn:
    """A finished turn. exchange: for the model, with features for images. page: for the visitor, with files for images."""

    exchange: Exchange
    page: list[GradioMessage]

    def size(self) -> int:
        """Bytes, about: of text, and of features."""
        parts = [part for side in self.exchange for part in parts_of(side)]
        features = sum(part.nbytes for part in parts if isinstance(part, Tensor))
        return features + len(str(self.page)) + sum(len(part) for part in parts if isinstance(part, str))


Turns = list[PageTurn]


class Sessions:
    """One model and its index, used by one visitor at a time. The turns are kept by Gradio, not here."""

    def __init__(self, model: Fromage, index: ImageIndex | None, preset: Preset) -> None:
        """Raises UserError for an unknown style of the preset, and for an index of another model."""
        self.model, self.index, self.preset, self.lock = model, index, preset, Lock()
        self._chat()

    def model_line(self) -> str:
        """The model's name, its towers, and what is to be known of it."""
        towers = f"{Path(self.model.lm.name).name} + {Path(self.model.vision.name).name}, k = {self.model.k}"
        named = f"{self.preset.name} ({towers})" if self.preset.name else towers
        return f"Model: {named}. {self.preset.about}".rstrip()

    def _chat(self) -> Chat:
        return Chat(self.model, self.index, self.preset.decoding, self.preset.style, self.preset.system)

    def answer(
        self,
        sent: GradioMessage,
        turns: Turns,
        ret_bias: float,
        temperature: float,
        images_per_ret: int,
        max_new_tokens: int,
    ) -> Iterator[tuple[Any, list[GradioMessage], Turns]]:
        """One turn while it is decoded: contents of the input box, the conversation, its turns. Errors are warnings."""
        chat = self._chat()
        chat.turns = [Turn([], Answer([], []), turn.exchange) for turn in turns]
        before = conversation(turns)
        try:
            said = read(sent)
            chat.decoding = replace(chat.decoding, **_moved(ret_bias, temperature, images_per_ret, max_new_tokens))
            page = [message("user", [content for part in said for content in contents(part)]), message("assistant", [])]
            yield {"text": "", "files": []}, [*before, page[0]], turns
            for answered in self._growing(chat, said):
                page[1] = message("assistant", answered)
                yield gr.skip(), [*before, *page], turns
            turns = latest([*turns, PageTurn(chat.turns[-1].exchange, page)])
            yield gr.skip(), conversation(turns), turns
        except UserError as error:
            warn(error)
            yield {"text": sent["text"], "files": []}, before, turns

    def _growing(self, chat: Chat, said: list[Part]) -> Iterator[list[Any]]:
        """The answer so far in Gradio's format, after each piece; each image is written once. Closing it stops decoding."""
        shown, text = list[Any](), ""
        with self.lock, closing(chat.stream(*said)) as stream:
            for piece in stream:
                if isinstance(piece, str):
                    text += piece
                else:
                    shown, text = [*shown, *contents(text), *contents(piece)], ""
                yield [*shown, *contents(text)]

    def undo(self, turns: Turns) -> tuple[list[GradioMessage], Turns]:
        """The conversation without its last turn."""
        return conversation(turns[:-1]), turns[:-1]

    def search(self, sent: GradioMessage, count: int, where: str = "") -> tuple[list[tuple[str, str]], str]:
        """The images of the index nearest to a text, an image, or both, best first: (file, caption) each.

        Beside them how the query was read. where: a filter over the metadata; '' for all images.
        """
        assert self.index is not None  # the page has no tab for it without one
        try:
            if where := where.strip():
                self.index.filter(where)
            said = read(sent)
            with self.lock:
                query = query_rows(self.model, [said])  # (1, q)
            hits = self.index.search(query, int(count), where=where)[0]
        except UserError as error:
            warn(error)
            return [], ""
        if not hits:
            gr.Info("No image fits the filter.")
        opened, lost = load_images(self.index.beyond(query[0], hits, where=where), int(count), SIDE)
        if lost:
            gr.Info(GONE)
        return [(drawn(image), caption(hit)) for hit, image in opened], read_as(self.model, said)


def latest(turns: Turns) -> Turns:
    """The last turns that may be kept of a conversation."""
    turns = turns[-MAX_TURNS:]
    while len(turns) > 1 and sum(turn.size() for turn in turns) > MAX_KEPT:
        turns = turns[1:]
    return turns


def _moved(*values: float) -> dict[str, Any]:
    """The values of the sliders, in the order of SLIDERS, by option."""
    return {name: int(value) if is_whole(name) else value for name, value in zip(SLIDERS, values, strict=True)}


def read(sent: GradioMessage) -> list[Part]:
    """The contents of an input box: images, then text, which is never a path or address. Raises UserError."""
    files, text = sent["files"], sent["text"].strip()
    if not files and not text:
        raise UserError("nothing was sent; write some words or add an image")
    if len(files) > MAX_SENT or len(text) > MAX_TEXT:
        raise UserError(f"that is too much at once; send up to {MAX_SENT} images and {MAX_TEXT:,} characters")
    return [*map(uploaded, files), *([text] if text else [])]


def uploaded(path: str) -> Image.Image:
    """The image of an uploaded file. Raises UserError for other files."""
    try:
        return decode_apart(Path(path).read_bytes(), side=LARGE)
    except OSError:
        raise UserError(f"{Path(path).name}: made room for newer uploads; add it again") from None
    except BrokenSample as error:
        raise UserError(f"{Path(path).name}: {error}; send another image") from error


def conversation(turns: Turns) -> list[GradioMessage]:
    """Turns in the format of Gradio's Chatbot; deleted image files are replaced by text."""
    messages = [each for turn in turns for each in turn.page]
    return [message(each["role"], [kept(content) for content in each["content"]]) for each in messages]


def message(role: str, shown: list[Any]) -> GradioMessage:
    """Contents as one message."""
    return {"role": role, "content": shown or ["(no answer)"]}


def kept(content: Any) -> Any:
    """Text, or an image file if it still exists."""
    return content if isinstance(content, str) or Path(content["path"]).exists() else "(an image that is kept no longer)"


def contents(part: Any) -> list[Any]:
    """A part in Gradio's format: texts, and image files, with captions if they were retrieved."""
    if isinstance(part, Image.Image):
        return [{"path": drawn(part), "alt_text": "an image that was sent"}]
    if not isinstance(part, RetrievedImages):
        return [escape(part, quote=False)] if part.strip() else []
    pairs = list(zip(part.hits, part.images, strict=True))
    found: list[Any] = [{"path": drawn(image), "alt_text": hit.caption} for hit, image in pairs]  # a row of thumbnails
    found += [escape("\n".join(caption(hit) for hit, _ in pairs), quote=False)] if pairs else []
    return found + ([GONE] if part.notes else []) if found else [f"[an image; {part.why_empty}]"]


def drawn(image: Image.Image) -> str:
    """Write an image into the served folder, under a name that cannot be guessed; returns its path."""
    data = jpeg(image, SIDE)
    path = Path(get_upload_folder(), blake2b(data, key=SECRET, digest_size=16).hexdigest() + ".jpg")
    with WholeFile(path, shared=True) as part:
        part.write_bytes(data)
    shelf_at(get_upload_folder()).wrote(len(data))
    return str(path)


def caption(hit: Hit) -> str:
    """The caption of a retrieved image, or its file name, without its path, which visitors must not see."""
    return f"#{hit.rank}  {hit.score:.2f}  {hit.label}"


def warn(error: UserError) -> None:
    """Tell the visitor; Gradio would read the text as HTML."""
    gr.Warning(OUT_OF_REACH if isinstance(error, OutOfReach) else escape(str(error)))
