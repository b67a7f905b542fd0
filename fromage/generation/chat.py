"""A conversation in which either side may send images.

    chat = Chat(model, index)
    answer = chat.say("Which of these is a star?", Path("sky.jpg"))
    for piece in chat.stream("Show me another one."): ...          # text and images as they are decoded

The prompt of a turn is system prompt, examples, earlier turns, then the new turn; how they stand there is a style
(fromage.generation.styles). If it is too long for the language model, the oldest turns are left out, then the examples; a
turn or example is left out as a whole, with its images.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fromage.generation.generate import Answer, stream
from fromage.generation.options import Decoding
from fromage.generation.preset import read_preset
from fromage.generation.retrieved import Resolve, RetrievedImages
from fromage.generation.styles import Exchange, Style, find_style
from fromage.models.fromage import Fromage
from fromage.models.prompts import (
    RET,
    ImageInput,
    Part,
    Prompt,
    encode_images,
    joined,
    parts_of,
    prompt_length,
)
from fromage.retrieval.results import load_images

if TYPE_CHECKING:
    from fromage.retrieval.base import ImageIndex


@dataclass
class Turn:
    """What the user said, and the answer. exchange: both as later prompts contain them, with features for images."""

    said: list[Part]
    answer: Answer
    exchange: Exchange = field(repr=False)


class Chat:
    """One conversation. Several can share a model, if only one of them decodes at a time.

    Attributes:
        turns: the conversation so far; `undo` and `reset` shorten it.
    """

    def __init__(
        self,
        model: Fromage,
        index: ImageIndex | None = None,
        decoding: Decoding | None = None,
        style: str | None = None,
        system: Prompt | None = None,
        examples: Sequence[tuple[Prompt, Prompt]] = (),
        resolve: Resolve | None = load_images,
    ) -> None:
        """Start a conversation. What is None is as the model's generation.json says, if it has one (see preset.py).

        Args:
            index: index of the images to retrieve; None for text-only answers.
            decoding: decoding options; they can be changed between turns. The style's stop texts are added to theirs.
            style: dialogue, plain, alone or template (see styles.py); without one the tokenizer's chat template is used
                where there is one, else dialogue.
            system: text at the front of every prompt; it is never left out.
            examples: few-shot examples, (said, answered), before the turns.
            resolve: how retrieved images are opened; if None they stay unopened, and the history contains [RET] alone.

        Raises:
            UserError: an unknown style, a chat template that does not render, an index built with another model, or an
                image that cannot be opened or fetched.
        """
        if index is not None:
            index.require_model(model)
        preset = read_preset(model.generation)
        self.model, self.index, self.decoding, self.resolve = model, index, decoding or preset.decoding, resolve
        self.style: Style = find_style(preset.style if style is None else style, model)
        self.turns: list[Turn] = []
        self.system = self._encoded(joined(parts_of(preset.system if system is None else system)))
        self.examples: list[Exchange] = [(self._encoded(said), self._encoded(answered)) for said, answered in examples]

    def say(self, *parts: Part) -> Answer:
        """One turn of text, images, files and addresses in any order. Returns the answer."""
        for _ in self.stream(*parts):
            pass
        return self.turns[-1].answer

    def stream(self, *parts: Part) -> Generator[str | RetrievedImages, None, None]:
        """The same, piece by piece. A turn that ends early, by an error or by closing the iterator, is not kept.

        Raises:
            UserError: the turn alone is too long for the language model, or an image cannot be opened or fetched.
        """
        said = self._encoded(parts)
        pieces: list[str | RetrievedImages] = []
        with closing(stream(self.model, self.prompt(said), self._decoding(), self.index, self.resolve)) as found:
            for piece in found:
                pieces.append(piece)
                yield piece
        answer = Answer.of(pieces, found.ids, found.cut)
        self.turns.append(Turn(list(parts), answer, (said, self._answered(answer))))

    def prompt(self, said: Prompt) -> list[Part]:
        """The prompt of a turn: the turn, and as much of the history as fits the language model."""
        history = [*self.examples, *(turn.exchange for turn in self.turns)] if self.style.history else []
        kept = dict(enumerate(history))
        droppable = [*range(len(self.examples), len(history)), *range(len(self.examples))]  # oldest turns, then examples
        room = (self.model.lm.max_length or math.inf) - self.decoding.max_new_tokens
        lengths: list[int] = []
        while True:
            parts = self.style.prompt(self.system, list(kept.values()), said)
            spare = room - prompt_length(self.model, parts)
            if spare >= 0 or not droppable:
                return parts
            lengths = lengths or self._lengths(history)
            while droppable and spare < 0:
                left_out = droppable.pop(0)
                spare += lengths[left_out]
                del kept[left_out]

    def _lengths(self, history: Sequence[Exchange]) -> list[int]:
        """How many tokens each turn adds to a prompt; joined texts can differ by some."""
        alone = prompt_length(self.model, self.style.prompt([], [], "a"))
        return [prompt_length(self.model, self.style.prompt([], [turn], "a")) - alone for turn in history]

    def undo(self) -> None:
        """Remove the last turn."""
        del self.turns[-1:]

    def reset(self) -> None:
        """Remove all turns."""
        self.turns.clear()

    def _decoding(self) -> Decoding:
        return replace(self.decoding, stop=(*self.decoding.stop, *self.style.stop))

    def _encoded(self, parts: Prompt) -> list[Part]:
        """The parts with features (m,) in place of images."""
        listed = parts_of(parts)
        features = iter(encode_images(self.model, [part for part in listed if isinstance(part, ImageInput)]))
        return [next(features) if isinstance(part, ImageInput) else part for part in listed]

    def _answered(self, answer: Answer) -> list[Part]:
        """An answer as later prompts contain it: the retrieved images in place of each [RET]."""
        parts: list[Part] = []
        for part in answer.parts:
            parts += [part] if isinstance(part, str) else self._encoded(part.images) or [RET]
        return parts
