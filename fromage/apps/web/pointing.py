"""Octopus in the web demo: an image and a text in, the image with boxes out."""

from __future__ import annotations

from threading import Lock

from PIL import Image

from fromage.apps.web.sessions import GradioMessage, drawn, read, warn
from fromage.errors import UserError
from fromage.octopus.decoding import ground, instruction
from fromage.octopus.drawing import draw_answer
from fromage.octopus.model import Octopus


class Pointing:
    """One Octopus, used by one visitor at a time. Uploads are not kept."""

    def __init__(self, octopus: Octopus, lock: Lock) -> None:
        self.octopus, self.lock = octopus, lock

    def point(self, sent: GradioMessage) -> tuple[str | None, str]:
        """The drawing, as a file, and the answer with index tokens such as <d3>. An error is shown as a warning."""
        try:
            image, asked = one_of_each(sent)
            with self.lock:
                (answer,) = ground(self.octopus, [(image, asked)])
        except UserError as error:
            warn(error)
            return None, ""
        return drawn(draw_answer(image, answer)), answer.text if answer.boxes else f"{answer.text} (points at nothing)"


def one_of_each(sent: GradioMessage) -> tuple[Image.Image, str]:
    """The image and the instruction of a message. Raises UserError for any other contents."""
    match read(sent):
        case [Image.Image() as image, str(text)]:
            return image, instruction(text)
    raise UserError("send one image, and words for what is meant in it")
