"""How to talk with a model, stored beside its weights: generation.json, as Hugging Face's generation_config.json.

    {"style": "alone", "decoding": {"ret_bias": 2, "images_per_ret": 4}, "system": "...", "examples": ["a red star"]}

It may come from elsewhere, so what it asks for keeps within the limits of a request over HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fromage.checkpoints.format import GENERATION
from fromage.errors import UserError
from fromage.generation.options import DEFAULTS, LIMITS, STOP_LENGTH, STOPS, Decoding

SYSTEM, LINE, EXAMPLES = 4000, 200, 8  # characters of the system prompt and of other texts; number of examples
TEXTS = {"style": 20, "system": SYSTEM, "name": LINE, "about": LINE}  # keys that hold a text, and how long it may be


@dataclass(frozen=True)
class Preset:
    """How to talk with a model. Options of a command and arguments in Python come before it.

    Attributes:
        style: of fromage.generation.styles; None: the chat template where the tokenizer has one, else dialogue.
        decoding: options of an answer.
        system: text in front of every prompt.
        name: of the model, for people.
        about: one line on what the model can do, for people.
        examples: texts to begin with.
    """

    style: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    system: str = ""
    name: str = ""
    about: str = ""
    examples: tuple[str, ...] = ()

    def over(self, style: str | None = None, system: str | None = None, decoding: Mapping[str, Any] | None = None) -> Preset:
        """The same with other values where they are given. decoding: options by name."""
        given: dict[str, Any] = {name: value for name, value in (("style", style), ("system", system)) if value is not None}
        return replace(self, **given, decoding=replace(self.decoding, **(decoding or {})))

    def stored(self) -> dict[str, Any]:
        """As generation.json holds it: what differs from the defaults."""
        plain = {name: getattr(self, name) for name in TEXTS if getattr(self, name)}
        options = {name: value for name in DEFAULTS if (value := getattr(self.decoding, name)) != DEFAULTS[name]}
        options |= {"stop": list(self.decoding.stop)} if self.decoding.stop else {}
        return plain | {"decoding": options, "examples": list(self.examples)}


def read_preset(stored: Mapping[str, Any] | None) -> Preset:
    """A preset as a model has it (`model.generation`); None: the defaults.

    Raises UserError for unknown keys, for values that mean nothing, and for those beyond the limits of a request.
    """
    stored = stored or {}
    _only(stored, {*TEXTS, "decoding", "examples"})
    for name, most in TEXTS.items():
        if not isinstance(text := stored.get(name, ""), str) or len(text) > most:
            raise UserError(f"{GENERATION}: {name} must be a text of at most {most} characters")
    examples = stored.get("examples", [])
    if not _texts(examples, EXAMPLES, LINE):
        raise UserError(f"{GENERATION}: examples must be at most {EXAMPLES} texts of at most {LINE} characters")
    texts = {name: stored[name] for name in TEXTS if name in stored}
    return Preset(**texts, decoding=_decoding(stored.get("decoding", {})), examples=tuple(examples))


def _decoding(options: Any) -> Decoding:
    if not isinstance(options, dict):
        raise UserError(f"{GENERATION}: decoding must be options by name")
    _only(options, {*DEFAULTS})
    if not _texts(options.get("stop", []), STOPS, STOP_LENGTH):
        raise UserError(f"{GENERATION}: stop must be at most {STOPS} texts of at most {STOP_LENGTH} characters")
    for name, value in options.items():
        if isinstance(DEFAULTS[name], bool) and not isinstance(value, bool):
            raise UserError(f"{GENERATION}: {name} must be true or false, not {str(value)[:40]}")
        served = LIMITS[name].served if name in LIMITS else None
        if served and isinstance(value, (int, float)) and not served[0] <= value <= served[1]:
            raise UserError(f"{GENERATION}: {name} is {value}; it must be from {served[0]:g} to {served[1]:g}")
    try:
        return Decoding(**options)
    except UserError as error:
        raise UserError(f"{GENERATION}: {error}") from None


def _only(given: Mapping[str, Any], known: set[str]) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{GENERATION}: unknown key {str(name)[:40]!r}; known are {', '.join(sorted(known))}")


def _texts(value: Any, count: int, length: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= count
        and all(isinstance(text, str) and 0 < len(text) <= length for text in value)
    )
