"""A conversation in which either side may send images.

    chat = Chat(model, index)
    answer = chat.say("Which of these is a star?", Path("sky.jpg"))
    for piece in chat.stream("Show me another one."): ...          # text and images as they are decoded

The prompt of a turn is system prompt, examples, earlier turns, then the new turn. If it is too long for the language model,
the oldest turns are left out, then the examples; a turn or example is left out as a whole, with its images.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

from fromage.errors import UserError
from fromage.generation.decoding import Decoding
from fromage.generation.generate import Answer, stream
from fromage.generation.preset import read_preset
from fromage.generation.retrieved import Resolve, RetrievedImages
from fromage.models.fromage import Fromage
from fromage.models.prompts import (
    RET,
    ImageInput,
    Part,
    Prompt,
    encode_images,
    is_text,
    joined,
    max_length,
    parts_of,
    prompt_length,
)
from fromage.retrieval.results import load_images

if TYPE_CHECKING:
    from fromage.retrieval.base import ImageIndex


@dataclass(frozen=True)
class Style:
    """The text around a turn in the prompt.

    Attributes:
        before: text before what the user said.
        between: text between it and the answer.
        after: text after the answer.
        stop: texts at which an answer ends.
        history: whether the prompt contains examples and earlier turns.
        images_first: whether the images of a turn with one text come first, then `before`, as in the released dialogues.
    """

    before: str
    between: str
    after: str
    stop: tuple[str, ...] = ("\n",)
    history: bool = True
    images_first: bool = False

    def ask(self, said: Prompt) -> list[Part]:
        """What the user said as the prompt contains it, up to where the answer begins."""
        parts = joined(parts_of(said))
        if self.images_first and sum(map(is_text, parts)) <= 1:
            parts.sort(key=is_text)
        first = next((i for i, part in enumerate(parts) if not isinstance(part, ImageInput)), len(parts))
        first = first if self.images_first else 0
        return joined([*parts[:first], self.before, *parts[first:], self.between])


STYLES = {
    "dialogue": Style("Q: ", "\nA:", "\n", images_first=True),  # the paper's dialogue prompts
    "plain": Style("", "", " "),  # the answer continues the user's text
    "alone": Style("", "", "", history=False),  # the same without history: like the captions and images of training
}


def find_style(name: str) -> Style:
    """A style by its name. Raises UserError for an unknown name."""
    if name not in STYLES:
        raise UserError(f"style {name}: there are {', '.join(STYLES)}")
    return STYLES[name]


@dataclass
class Turn:
    """What the user said, and the answer. parts: both as later prompts contain them, with features for images."""

    said: list[Part]
    answer: Answer
    parts: list[Part] = field(repr=False)


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
            style: a key of STYLES.
            system: text at the front of every prompt; it is never left out.
            examples: few-shot examples, (said, answered), before the turns.
            resolve: how retrieved images are opened; if None they stay unopened, and the history contains [RET] alone.

        Raises:
            UserError: unknown style, an index built with another model, or an image that cannot be opened or fetched.
        """
        if index is not None:
            index.require_model(model)
        preset = read_preset(model.generation)
        self.model, self.index, self.decoding, self.resolve = model, index, decoding or preset.decoding, resolve
        self.style, self.turns = find_style(preset.style if style is None else style), list[Turn]()
        front = joined(parts_of(preset.system if system is None else system))
        self.system = self._encoded([*front, self.style.after]) if front else []
        self.examples = [self._framed(self._encoded(said), self._encoded(answered)) for said, answered in examples]

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
        for piece in stream(self.model, self.prompt(said), self._decoding(), self.index, self.resolve):
            pieces.append(piece)
            yield piece
        answer = Answer.of(pieces)
        self.turns.append(Turn(list(parts), answer, self._framed(said, self._answered(answer))))

    def prompt(self, said: Prompt) -> list[Part]:
        """The prompt of a turn: the turn, and as much of the history as fits the language model."""
        asked = self.style.ask(said)
        history = [*self.examples, *(turn.parts for turn in self.turns)] if self.style.history else []
        droppable = [*range(len(self.examples), len(history)), *range(len(self.examples))]  # oldest turns, then examples
        room = (max_length(self.model) or math.inf) - self.decoding.max_new_tokens
        start = len(self.model.tokenizer.start())
        lengths = [prompt_length(self.model, block) - start for block in history]  # joined texts can differ by some tokens
        spare = room - prompt_length(self.model, [*self.system, *asked]) - sum(lengths)
        while True:
            while droppable and spare < 0:
                left_out = droppable.pop(0)
                spare += lengths[left_out]
                history[left_out] = []
            parts = joined([*self.system, *chain.from_iterable(history), *asked])
            spare = room - prompt_length(self.model, parts)
            if spare >= 0 or not droppable:
                return parts

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

    def _framed(self, said: Sequence[Part], answered: Sequence[Part]) -> list[Part]:
        return joined([*self.style.ask(said), *answered, self.style.after])
