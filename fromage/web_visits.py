"""What visitors of the web demo ask of the model, and their conversations as Gradio shows them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import closing
from hashlib import blake2b
from html import escape
from pathlib import Path
from secrets import token_bytes, token_hex
from threading import Lock
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder
from PIL import Image

from fromage.chat import Chat, Turn
from fromage.decoding import Decoding
from fromage.embed_pictures import embed_opened
from fromage.errors import BrokenSample, UserError
from fromage.gallery import Shown
from fromage.generate import Answer
from fromage.hits import SPARE, Hit, openable
from fromage.model import Fromage
from fromage.pictures import decode_picture
from fromage.prompts import Part, embed_for_retrieval

if TYPE_CHECKING:
    from fromage.index import ImageIndex

MAX_SENT = 8  # pictures in a message
MAX_TEXT = 20_000  # characters in a message
LARGE = 4096  # pixels of the longer side of a picture that was sent
SIDE = 1024  # and of all pictures, once the model has seen them
Turns = list[Turn]
Message = dict[str, Any]  # of Gradio: in a conversation its role and contents, in a box its text and files
SECRET = token_bytes(16)


class Visits:
    """One model and its index, used by one visitor at a time. Of the visitors nothing is kept: their turns come and go."""

    def __init__(self, model: Fromage, index: ImageIndex | None, style: str) -> None:
        self.model, self.index, self.style, self.lock = model, index, style, Lock()

    def answer(
        self, sent: Message, turns: Turns, ret_bias: float, temperature: float, pictures: int, length: int
    ) -> Iterator[tuple[Any, list[Message], Turns]]:
        """One turn as it is decoded: what stands in the box, the conversation, its turns. What fails is a warning."""
        chat = Chat(self.model, self.index, style=self.style)
        chat.turns = turns
        before = conversation(turns)
        try:
            said = read(sent)
            chat.decoding = Decoding(int(length), temperature=temperature, ret_bias=ret_bias, images_per_ret=int(pictures))
            yield {"text": "", "files": []}, [*before, message("user", said)], turns
            for parts in self._growing(chat, said):
                yield gr.skip(), [*before, message("user", said), message("assistant", parts)], turns
            shrink(turns[-1])
            yield gr.skip(), conversation(turns), turns
        except UserError as error:
            warn(error)
            yield {"text": sent["text"], "files": []}, before, turns

    def _growing(self, chat: Chat, said: list[Part]) -> Iterator[list[str | Shown]]:
        """The parts of the answer so far, after each piece. Closing it ends the decoding."""
        pieces: list[str | Shown] = []
        with self.lock, closing(chat.stream(*said)) as stream:
            for piece in stream:
                pieces.append(piece)
                yield Answer.of(pieces).parts

    def undo(self, turns: Turns) -> tuple[list[Message], Turns]:
        """The conversation without its last turn."""
        return conversation(turns[:-1]), turns[:-1]

    def search(self, sent: Message, count: int) -> list[tuple[str, str]]:
        """The pictures of the index nearest to words, to a picture, or to both, best first: files, captions."""
        try:
            with self.lock:
                query = self._query(read(sent))  # (1, q)
            hits = self.index.search(query, int(count) + SPARE)[0] if self.index else []
        except UserError as error:
            warn(error)
            return []
        opened, notes = openable(hits, int(count))
        if notes:
            gr.Info(gone(notes))
        return [(drawn(picture), caption(hit)) for hit, picture in opened]

    def _query(self, parts: list[Part]) -> np.ndarray:
        """(1, q): of a lone picture its own embedding, of all else what [RET] behind it asks for."""
        if len(parts) == 1 and isinstance(parts[0], Image.Image):
            return embed_opened(self.model, [parts[0]])
        return embed_for_retrieval(self.model, [parts]).cpu().numpy()


def read(sent: Message) -> list[Part]:
    """What a box holds: pictures, then words, which are never taken for a path or address. Raises UserError."""
    files, text = sent["files"], sent["text"].strip()
    if not files and not text:
        raise UserError("nothing was sent; write some words or add a picture")
    if len(files) > MAX_SENT or len(text) > MAX_TEXT:
        raise UserError(f"that is too much at once; send up to {MAX_SENT} pictures and {MAX_TEXT:,} characters")
    return [*map(uploaded, files), *([text] if text else [])]


def uploaded(path: str) -> Image.Image:
    """A file that was sent. Raises UserError for anything but a picture."""
    try:
        return small(decode_picture(Path(path).read_bytes()), LARGE)
    except BrokenSample as error:
        raise UserError(f"{Path(path).name}: {error}; send another picture") from error


def conversation(turns: Turns) -> list[Message]:
    """Turns as Gradio's Chatbot shows them."""
    return [each for turn in turns for each in (message("user", turn.said), message("assistant", turn.answer.parts))]


def message(role: str, parts: Sequence[Any]) -> Message:
    """Parts of a turn as one message: texts, and files of pictures, those found with their captions."""
    return {"role": role, "content": [content for part in parts for content in contents(part)] or ["(no answer)"]}


def contents(part: Any) -> list[Any]:
    """A part as Gradio shows it."""
    if isinstance(part, Image.Image):
        return [{"path": drawn(part), "alt_text": "a picture that was sent"}]
    if not isinstance(part, Shown):
        return [escape(part, quote=False)] if part.strip() else []
    found: list[Any] = []
    for hit, picture in zip(part.hits, part.pictures, strict=True):
        found += [{"path": drawn(picture), "alt_text": hit.caption}, escape(caption(hit), quote=False)]
    return found + ([gone(part.notes)] if part.notes else []) or ["[a picture; there is none to show]"]


def drawn(picture: Image.Image) -> str:
    """Path of the picture in the folder that is served, under a name that cannot be guessed."""
    file = io.BytesIO()
    small(picture, SIDE).save(file, "JPEG", quality=90)
    path = Path(get_upload_folder(), blake2b(file.getvalue(), key=SECRET, digest_size=16).hexdigest() + ".jpg")
    if not path.exists():
        part = path.with_name(f".{token_hex(8)}")
        part.write_bytes(file.getvalue())
        part.replace(path)
    return str(path)


def small(picture: Image.Image, side: int) -> Image.Image:
    """The picture, or a copy whose longer side has so many pixels."""
    if max(picture.size) <= side:
        return picture
    picture = picture.copy()
    picture.thumbnail((side, side))
    return picture


def caption(hit: Hit) -> str:
    """What stands under a picture found; its path is nobody's business."""
    return f"#{hit.rank}  {hit.score:.2f}  {hit.caption}".rstrip()


def gone(notes: Sequence[str]) -> str:
    """A note on pictures that could not be opened; their own notes name paths."""
    return f"({len(notes)} found before could not be opened)"


def shrink(turn: Turn) -> None:
    """Keep the turn's pictures small: the model has seen them."""
    for part in [*turn.said, *(picture for shown in turn.answer.shown for picture in shown.pictures)]:
        if isinstance(part, Image.Image):
            part.thumbnail((SIDE, SIDE))


def warn(error: UserError) -> None:
    """Tell the visitor; Gradio would read the text as HTML."""
    gr.Warning(escape(str(error)))
