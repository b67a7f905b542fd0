"""How a conversation stands in a prompt: by texts around the turns, or by the chat template of the tokenizer.

A template is rendered with placeholders for what was said, and cut at them. So special tokens in it become their ids, while
what a user writes stays text: it can become neither a special token nor an image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from fromage.data.tokenizer import PromptTokenizer
from fromage.errors import UserError, first_line
from fromage.models.base import VisualPrefixLM
from fromage.models.prompts import RET, START, ImageInput, Part, Prompt, Token, is_text, joined, parts_of

Exchange = tuple[Prompt, Prompt]  # what was said, and what was answered
TEMPLATE = "template"  # the style of the tokenizer's chat template
_PLACE = re.compile("\ue000([0-9]{1,9})\ue001")


class Style(Protocol):
    """How a conversation stands in a prompt.

    Attributes:
        stop: texts at which an answer ends; a special token's text stands for the token.
        history: whether the prompt contains examples and earlier turns.
    """

    @property
    def stop(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def history(self) -> bool: ...  # noqa: D102

    def prompt(self, system: Prompt, turns: Sequence[Exchange], said: Prompt) -> list[Part]:
        """The prompt of a turn, up to where the answer begins. system: may be empty."""
        ...


@dataclass(frozen=True)
class TurnTexts:
    """Texts around the turns.

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

    def prompt(self, system: Prompt, turns: Sequence[Exchange], said: Prompt) -> list[Part]:
        """See Style."""
        front = joined(parts_of(system))
        framed = [[*self._ask(asked), *parts_of(answered), self.after] for asked, answered in turns]
        return joined([*front, *([self.after] if front else []), *chain.from_iterable(framed), *self._ask(said)])

    def _ask(self, said: Prompt) -> list[Part]:
        parts = images_first(said) if self.images_first else joined(parts_of(said))
        first = next((i for i, part in enumerate(parts) if not isinstance(part, ImageInput)), len(parts))
        first = first if self.images_first else 0
        return [*parts[:first], self.before, *parts[first:], self.between]


class Template:
    """The chat template of an instruct model's tokenizer.

    Images and [RET] stand where they were said; as in training, the images of a turn with one text come before it. The
    template brings its own start token, or none; one without any special token has the tokenizer's at its front. Where
    it refuses a system role, the system prompt stands in front of the first text of the user.

    Attributes:
        stop: what follows an answer, see Style.
    """

    history = True

    def __init__(self, tokenizer: PromptTokenizer, name: str) -> None:
        """name: of the language model. Raises UserError for a template that does not render, or loses what was said."""
        self.tokenizer, self.name, self.system_role = tokenizer, name, True
        try:
            self._rendered([("system", ["a"]), ("user", ["b"])])
        except UserError:
            self.system_role = False
        parts = self._rendered([("user", ["a"]), ("assistant", [RET]), ("user", [START])])
        follows = parts[parts.index(RET) + 1 : parts.index(START)]
        first = next((part for part in follows if not is_text(part) or part.strip()), "".join(map(str, follows)))
        ends = tokenizer.hf.convert_ids_to_tokens(first.id) if isinstance(first, Token) else str(first)
        self.stop: tuple[str, ...] = (*filter(None, [ends.strip().partition("\n")[0] or ends]),)

    def prompt(self, system: Prompt, turns: Sequence[Exchange], said: Prompt) -> list[Part]:
        """See Style."""
        front = parts_of(system)
        asked = [images_first(each) for each in (*(first for first, _ in turns), said)]
        messages = [("system", front)] if front and self.system_role else []
        if front and not self.system_role:
            first = next((i for i, part in enumerate(asked[0]) if is_text(part)), len(asked[0]))
            asked[0][first:first] = [*front, "\n\n"]
        for each, (_, answered) in zip(asked, turns, strict=False):
            messages += [("user", each), ("assistant", parts_of(answered))]
        parts = joined(self._rendered([*messages, ("user", asked[-1])]))
        return parts if any(isinstance(part, Token) for part in parts) else [START, *parts]

    def _rendered(self, messages: Sequence[tuple[str, Sequence[Part]]]) -> list[Part]:
        """Messages by role, (role, parts), as the template puts them: texts, special tokens, and the parts as they are."""
        held: list[Part] = []
        filled = [
            {"role": role, "content": "".join(_place(part, held) for part in joined(parts))} for role, parts in messages
        ]
        remedy = "choose another style: --style dialogue, plain or alone"
        try:
            text: Any = self.tokenizer.hf.apply_chat_template(
                filled, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:
            raise UserError(f"the chat template of {self.name} does not render ({first_line(error)}); {remedy}") from error
        pieces = _PLACE.split(str(text))  # text, number, text, ..., text
        if sorted(map(int, pieces[1::2])) != [*range(len(held))]:
            raise UserError(f"the chat template of {self.name} leaves out or repeats what was said; {remedy}")
        out: list[Part] = []
        for i, piece in enumerate(pieces):
            marked = [held[int(piece)]] if i % 2 else self.tokenizer.markup(piece)
            out += [Token(part) if isinstance(part, int) else part for part in marked]
        return out


def _place(part: Part, held: list[Part]) -> str:
    """A placeholder for a part; the spaces around a text stand beside it, so that the template can strip them."""
    before = after = ""
    if is_text(part):
        if not (bare := part.strip()):
            return part
        before, _, after = part.partition(bare)
        part = bare
    held.append(part)
    return f"{before}\ue000{len(held) - 1}\ue001{after}"


STYLES = {
    "dialogue": TurnTexts("Q: ", "\nA:", "\n", images_first=True),  # the paper's dialogue prompts
    "plain": TurnTexts("", "", " "),  # the answer continues the user's text
    "alone": TurnTexts("", "", "", history=False),  # the same without history: like the captions and images of training
}


def find_style(name: str | None, model: VisualPrefixLM) -> Style:
    """A style by its name; None: the chat template where the model's tokenizer has one, else dialogue.

    Raises UserError for an unknown name, and for a template that is not there or does not render.
    """
    name = name or (TEMPLATE if model.tokenizer.has_template else "dialogue")
    if name == TEMPLATE:
        if not model.tokenizer.has_template:
            raise UserError(
                f"style {name}: the tokenizer of {model.lm.name} has no chat template; choose {' or '.join(STYLES)}"
            )
        return Template(model.tokenizer, model.lm.name)
    if name not in STYLES:
        raise UserError(f"style {name}: there are {', '.join([*STYLES, TEMPLATE])}")
    return STYLES[name]


def images_first(said: Prompt) -> list[Part]:
    """The parts of a turn; if they have one text, with the images before it."""
    parts = joined(parts_of(said))
    return sorted(parts, key=is_text) if sum(map(is_text, parts)) <= 1 else parts
