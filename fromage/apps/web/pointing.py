"""What visitors of the web demo ask of Octopus: an image and words go in, the image comes back with boxes drawn."""

from __future__ import annotations

from threading import Lock

from PIL import Image

from fromage.apps.web.sessions import Message, drawn, read, warn
from fromage.errors import UserError
from fromage.octopus.decoding import ground, instruction
from fromage.octopus.drawing import draw_answer
from fromage.octopus.model import Octopus

LENGTH = 128  # new tokens at most


class Pointing:
    """One Octopus, used by one visitor at a time. Nothing is kept of what they send."""

    def __init__(self, octopus: Octopus, lock: Lock) -> None:
        self.octopus, self.lock = octopus, lock

    def point(self, sent: Message) -> tuple[str | None, str]:
        """The drawing, as a file, and the answer in words and marks such as <d3>. What fails is a warning."""
        try:
            image, asked = one_of_each(sent)
            with self.lock:
                (answer,) = ground(self.octopus, [(image, asked)], LENGTH)
        except UserError as error:
            warn(error)
            return None, ""
        return drawn(draw_answer(image, answer)), answer.text if answer.boxes else f"{answer.text} (points at nothing)"


def one_of_each(sent: Message) -> tuple[Image.Image, str]:
    """The image and the instruction of a box. Raises UserError where it holds anything else."""
    match read(sent):
        case [Image.Image() as image, str(text)]:
            return image, instruction(text)
    raise UserError("send one image, and words for what is meant in it")
