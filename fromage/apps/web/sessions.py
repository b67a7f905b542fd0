"""What visitors of the web demo ask of the model, and their conversations as Gradio shows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from html import escape
from pathlib import Path
from secrets import token_bytes, token_hex
from threading import Lock
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from fromage.errors import BrokenSample, UserError
from fromage.generation.chat import Chat, Turn
from fromage.generation.decoding import Decoding
from fromage.generation.generate import Answer
from fromage.generation.retrieved import Shown
from fromage.images.codec import STRANGERS_PIXELS, decode_image, jpeg, small
from fromage.models.fromage import Fromage
from fromage.models.prompts import Part
from fromage.retrieval.queries import embed_queries
from fromage.retrieval.results import Hit, load_images

if TYPE_CHECKING:
    from fromage.retrieval.faiss_index import ImageIndex

MAX_SENT = 8  # images in a message
MAX_TEXT = 20_000  # characters in a message
LARGE = 4096  # pixels of the longer side of an image that was sent
SIDE = 1024  # and of an image on the page
MAX_TURNS = 100  # of a conversation that are kept; a language model has positions for fewer
Message = dict[str, Any]  # of Gradio: in a conversation its role and contents, in a box its text and files
SECRET = token_bytes(16)
GONE = "(better ones could not be opened)"  # in place of notes that name paths


@dataclass
class Said:
    """A turn that is over. parts: for the model, its images as features. page: for the visitor, as files."""

    parts: list[Part]
    page: list[Message]


Turns = list[Said]


class Sessions:
    """One model and its index, used by one visitor at a time. Of the visitors nothing is kept: their turns come and go."""

    def __init__(self, model: Fromage, index: ImageIndex | None, style: str) -> None:
        """Raises UserError for an index of another model."""
        if index is not None:
            index.require_model(model)
        self.model, self.index, self.style, self.lock = model, index, style, Lock()

    def answer(
        self, sent: Message, turns: Turns, ret_bias: float, temperature: float, images: int, length: int
    ) -> Iterator[tuple[Any, list[Message], Turns]]:
        """One turn as it is decoded: what stands in the box, the conversation, its turns. What fails is a warning."""
        chat = Chat(self.model, self.index, style=self.style)
        chat.turns = [Turn([], Answer([], []), turn.parts) for turn in turns]
        before = conversation(turns)
        try:
            said = read(sent)
            chat.decoding = Decoding(int(length), temperature=temperature, ret_bias=ret_bias, images_per_ret=int(images))
            page = [message("user", [content for part in said for content in contents(part)]), message("assistant", [])]
            yield {"text": "", "files": []}, [*before, page[0]], turns
            for answered in self._growing(chat, said):
                page[1] = message("assistant", answered)
                yield gr.skip(), [*before, *page], turns
            turns = [*turns, Said(chat.turns[-1].parts, page)][-MAX_TURNS:]
            yield gr.skip(), conversation(turns), turns
        except UserError as error:
            warn(error)
            yield {"text": sent["text"], "files": []}, before, turns

    def _growing(self, chat: Chat, said: list[Part]) -> Iterator[list[Any]]:
        """The answer so far as the page shows it, piece by piece; an image is drawn once. Closing it ends the decoding."""
        shown, text = list[Any](), ""
        with self.lock, closing(chat.stream(*said)) as stream:
            for piece in stream:
                if isinstance(piece, str):
                    text += piece
                else:
                    shown, text = [*shown, *contents(text), *contents(piece)], ""
                yield [*shown, *contents(text)]

    def undo(self, turns: Turns) -> tuple[list[Message], Turns]:
        """The conversation without its last turn."""
        return conversation(turns[:-1]), turns[:-1]

    def search(self, sent: Message, count: int) -> list[tuple[str, str]]:
        """The images of the index nearest to words, to an image, or to both, best first: files, captions."""
        assert self.index is not None  # the page has no tab for it without one
        try:
            with self.lock:
                query = embed_queries(self.model, [read(sent)]).cpu().numpy()  # (1, q)
            hits = self.index.search(query, int(count))[0]
        except UserError as error:
            warn(error)
            return []
        opened, lost = load_images(self.index.beyond(query[0], hits), int(count))
        if lost:
            gr.Info(GONE)
        return [(drawn(image), caption(hit)) for hit, image in opened]


def read(sent: Message) -> list[Part]:
    """What a box holds: images, then words, which are never taken for a path or address. Raises UserError."""
    files, text = sent["files"], sent["text"].strip()
    if not files and not text:
        raise UserError("nothing was sent; write some words or add an image")
    if len(files) > MAX_SENT or len(text) > MAX_TEXT:
        raise UserError(f"that is too much at once; send up to {MAX_SENT} images and {MAX_TEXT:,} characters")
    return [*map(uploaded, files), *([text] if text else [])]


def uploaded(path: str) -> Image.Image:
    """A file that was sent. Raises UserError for anything but an image."""
    try:
        return small(decode_image(Path(path).read_bytes(), STRANGERS_PIXELS), LARGE)
    except BrokenSample as error:
        raise UserError(f"{Path(path).name}: {error}; send another image") from error


def conversation(turns: Turns) -> list[Message]:
    """Turns as Gradio's Chatbot shows them, their images for as long as the files are kept."""
    messages = [each for turn in turns for each in turn.page]
    return [message(each["role"], [kept(content) for content in each["content"]]) for each in messages]


def message(role: str, shown: list[Any]) -> Message:
    """Contents as one message."""
    return {"role": role, "content": shown or ["(no answer)"]}


def kept(content: Any) -> Any:
    """Text, or an image's file if it is still there."""
    return content if isinstance(content, str) or Path(content["path"]).exists() else "(an image that is kept no longer)"


def contents(part: Any) -> list[Any]:
    """A part as Gradio shows it: texts, and files of images, those found with their captions."""
    if isinstance(part, Image.Image):
        return [{"path": drawn(part), "alt_text": "an image that was sent"}]
    if not isinstance(part, Shown):
        return [escape(part, quote=False)] if part.strip() else []
    found: list[Any] = []
    for hit, image in zip(part.hits, part.images, strict=True):
        found += [{"path": drawn(image), "alt_text": hit.caption}, escape(caption(hit), quote=False)]
    return found + ([GONE] if part.notes else []) if found else [f"[an image; {part.nothing}]"]


def drawn(image: Image.Image) -> str:
    """Path of the image in the folder that is served, under a name that cannot be guessed."""
    data = jpeg(image, SIDE)
    path = Path(get_upload_folder(), blake2b(data, key=SECRET, digest_size=16).hexdigest() + ".jpg")
    part = path.with_name(f".{token_hex(8)}")
    part.write_bytes(data)
    part.replace(path)
    return str(path)


def caption(hit: Hit) -> str:
    """What stands under an image found; its path is nobody's business."""
    return f"#{hit.rank}  {hit.score:.2f}  {hit.caption}".rstrip()


def warn(error: UserError) -> None:
    """Tell the visitor; Gradio would read the text as HTML."""
    gr.Warning(escape(str(error)))
