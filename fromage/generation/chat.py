"""A conversation in which either side may send images.

    chat = Chat(model, index)
    answer = chat.say("Which of these is a star?", Path("sky.jpg"))
    for piece in chat.stream("Show me another one."): ...          # text and images as they are decoded

What was said and shown stands in front of every turn: system prompt, examples, the turns so far. When it grows beyond the
language model's positions the oldest turns are left out, then the examples, each as a whole with its images.
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
from fromage.generation.retrieved import Resolve, Shown
from fromage.models.fromage import Fromage
from fromage.models.prompts import (
    RET,
    START,
    ImageInput,
    Part,
    Prompt,
    encode_images,
    max_length,
    part_ids,
    parts_of,
    prompt_length,
    worded,
)
from fromage.retrieval.results import load_images

if TYPE_CHECKING:
    from fromage.retrieval.faiss_index import ImageIndex


@dataclass(frozen=True)
class Style:
    """What stands around the words of a turn.

    Attributes:
        stop: where an answer ends.
        history: whether examples and earlier turns stand in front of a turn.
    """

    before: str
    between: str
    behind: str
    stop: tuple[str, ...] = ("\n",)
    history: bool = True


STYLES = {
    "dialogue": Style("Q: ", "\nA:", "\n"),  # as the paper prompts
    "plain": Style("", "", " "),  # what is said is simply gone on from
    "alone": Style("", "", "", history=False),  # likewise, and each turn by itself: as captions and images in training
}


def find_style(name: str) -> Style:
    """A style by its name. Raises UserError where there is none."""
    if name not in STYLES:
        raise UserError(f"style {name}: there are {', '.join(STYLES)}")
    return STYLES[name]


@dataclass
class Turn:
    """What the user said and what came back. parts: both as they stand in later prompts, their images as features."""

    said: list[Part]
    answer: Answer
    parts: list[Part] = field(repr=False)


class Chat:
    """One conversation. Several may share a model, as long as only one of them decodes at a time.

    Attributes:
        turns: the conversation so far; `undo` and `reset` shorten it.
    """

    def __init__(
        self,
        model: Fromage,
        index: ImageIndex | None = None,
        decoding: Decoding | None = None,
        style: str = "dialogue",
        system: Prompt = (),
        examples: Sequence[tuple[Prompt, Prompt]] = (),
        resolve: Resolve | None = load_images,
    ) -> None:
        """Start a conversation.

        Args:
            index: where images are found; None for text alone.
            decoding: how answers are decoded; it may be exchanged between turns. Its stop texts count beside the style's.
            style: of STYLES.
            system: stands at the front as a line or sentence of its own, as the style has it, and is never left out.
            examples: what was said and answered in few-shot examples, in front of the turns.
            resolve: how found images are opened; None leaves them unopened, and [RET] alone in the history.

        Raises:
            UserError: there is no such style, the index was built with another model, or an image cannot be had.
        """
        if index is not None:
            index.require_model(model)
        self.model, self.index, self.decoding, self.resolve = model, index, decoding or Decoding(), resolve
        self.style, self.turns = find_style(style), list[Turn]()
        front = worded(parts_of(system))
        self.system = self._encoded([*front, self.style.behind]) if front else []
        self.examples = [self._framed(self._encoded(said), self._encoded(answered)) for said, answered in examples]

    def say(self, *parts: Part) -> Answer:
        """One turn: text, images, files and addresses in any order; what came back."""
        for _ in self.stream(*parts):
            pass
        return self.turns[-1].answer

    def stream(self, *parts: Part) -> Generator[str | Shown, None, None]:
        """The same, piece by piece. A turn that is broken off, by an error or by closing the iterator, leaves no trace.

        Raises:
            UserError: the turn alone is too long for the language model, or an image cannot be had.
        """
        said = self._encoded(parts)
        pieces: list[str | Shown] = []
        for piece in stream(self.model, self.prompt(said), self._decoding(), self.index, self.resolve):
            pieces.append(piece)
            yield piece
        answer = Answer.of(pieces)
        self.turns.append(Turn(list(parts), answer, self._framed(said, self._answered(answer))))

    def prompt(self, said: Prompt) -> list[Part]:
        """The prompt of a turn: as much of the history as the language model has positions for."""
        ends: list[Part] = [self.style.before, *parts_of(said), self.style.between]
        history = [*self.examples, *(turn.parts for turn in self.turns)] if self.style.history else []
        droppable = [*range(len(self.examples), len(history)), *range(len(self.examples))]  # oldest turns, then examples
        lengths = [sum(len(part_ids(self.model, part)) for part in block) for block in history]
        room = (max_length(self.model) or math.inf) - self.decoding.max_new_tokens
        spare = room - prompt_length(self.model, [*self.system, *ends]) - sum(lengths)
        for i in droppable:
            if spare >= 0:
                break
            spare += lengths[i]
            history[i] = []
        parts = worded([*self.system, *chain.from_iterable(history), *ends])
        return [*parts, START] if parts and isinstance(parts[-1], ImageInput) else parts  # as captions stand in training

    def undo(self) -> None:
        """Take the last turn back."""
        del self.turns[-1:]

    def reset(self) -> None:
        """Forget all turns."""
        self.turns.clear()

    def _decoding(self) -> Decoding:
        return replace(self.decoding, stop=(*self.decoding.stop, *self.style.stop))

    def _encoded(self, parts: Prompt) -> list[Part]:
        """The parts, each image encoded once and for all."""
        listed = parts_of(parts)
        features = iter(encode_images(self.model, [part for part in listed if isinstance(part, ImageInput)]))
        return [next(features) if isinstance(part, ImageInput) else part for part in listed]

    def _answered(self, answer: Answer) -> list[Part]:
        """An answer as it stands in later prompts: what was shown in the place of its [RET]."""
        parts: list[Part] = []
        for part in answer.parts:
            parts += [part] if isinstance(part, str) else self._encoded(part.images) or [RET]
        return parts

    def _framed(self, said: Sequence[Part], answered: Sequence[Part]) -> list[Part]:
        return worded([self.style.before, *said, self.style.between, *answered, self.style.behind])
