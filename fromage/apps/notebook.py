"""A conversation in a notebook: an input line and an upload button below the turns so far."""

from __future__ import annotations

from html import escape
from typing import Any

from PIL import Image

from fromage.distribution import pip_install
from fromage.errors import BrokenSample, UserError
from fromage.generation.chat import Chat
from fromage.generation.retrieved import RetrievedImages
from fromage.images.codec import decode_image, small, to_png

try:
    import ipywidgets as widgets
except ImportError as error:
    raise UserError(f"the chat widget needs ipywidgets: {pip_install('notebooks')}") from error

SIDE = 160  # width of an image in pixels
GREY, RED = "#70747c", "#b3261e"


class NotebookChat:
    """The conversation as a widget: `display(NotebookChat(chat).box)`. A turn is the images, then the line."""

    def __init__(self, chat: Chat) -> None:
        self.chat, self.marks = chat, list[int]()  # number of widgets before each turn
        self.said = widgets.VBox()
        self.line = widgets.Text(placeholder="say something", layout=widgets.Layout(flex="1"))
        self.upload = widgets.FileUpload(accept="image/*", multiple=True, description="Images")
        self.send, self.undo = widgets.Button(description="Send"), widgets.Button(description="Undo")
        self.send.on_click(self._send)
        self.undo.on_click(self._undo)
        self.box = widgets.VBox([self.said, widgets.HBox([self.line, self.upload, self.send, self.undo])])

    def _send(self, button: Any) -> None:
        """One turn; the text of the answer grows while it is decoded. A failed turn is replaced by its error."""
        before, self.send.disabled = self.said.children, True
        try:
            sent = [decode_image(bytes(file["content"])) for file in self.upload.value]
            if sent or self.line.value.strip():
                self._turn(sent, self.line.value.strip())
                self.marks.append(len(before))
            self.line.value, self.upload.value = "", ()
        except (UserError, BrokenSample) as error:
            self.said.children = (*before, _words(str(error), RED))
        finally:
            self.send.disabled = False

    def _turn(self, sent: list[Image.Image], line: str) -> None:
        text, answer = "", _words("")
        self._add(*map(_drawn, sent), _words(line, GREY), answer)
        for piece in self.chat.stream(*sent, *([line] if line else [])):
            if isinstance(piece, RetrievedImages):
                text, answer = "", _words("")
                self._add(*self._shown(piece), answer)
            else:
                text += piece
                answer.value = _words(text).value

    def _shown(self, shown: RetrievedImages) -> list[Any]:
        """The images of a [RET], each above its score and caption."""
        cells = [
            widgets.VBox([_drawn(image), _words(f"#{hit.rank} {hit.score:.3f} {hit.label}", GREY)])
            for hit, image in zip(shown.hits, shown.images, strict=False)
        ]
        notes = [*shown.notes, *([f"[an image; {shown.why_empty}]"] if shown.why_empty else [])]
        return [widgets.HBox(cells), *(_words(note, GREY) for note in notes)]

    def _undo(self, button: Any) -> None:
        """Remove the last turn from the conversation and the page."""
        if self.marks:
            self.chat.undo()
            self.said.children = self.said.children[: self.marks.pop()]

    def _add(self, *what: Any) -> None:
        self.said.children = (*self.said.children, *what)


def _words(text: str, colour: str = "inherit") -> Any:
    return widgets.HTML(f'<span style="color: {colour}; white-space: pre-wrap">{escape(text)}</span>')


def _drawn(image: Image.Image) -> Any:
    # twice the size, for high-resolution screens
    return widgets.Image(value=to_png(small(image, 2 * SIDE)), format="png", width=SIDE)
