"""Options of an answer: defaults, limits and descriptions for Python, the terminal, HTTP and the web's sliders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, Literal

from docstring_parser import parse

from fromage.checks import check_real, check_whole
from fromage.errors import UserError

StyleName = Literal["dialogue", "plain", "alone", "template"]  # of fromage.generation.styles
STOPS, STOP_LENGTH = 8, 64  # stop texts of a request or a preset, and characters of each


@dataclass(frozen=True)
class OptionLimits:
    """What an option may be.

    Attributes:
        least: smallest value that has a meaning.
        most: largest value that has one.
        served: smallest and largest value of a request over HTTP; None where requests do not have the option.
        slider: smallest value, largest value and step of the web demo's slider.
        label: its name there.
        zero: what 0 means where it is allowed besides.
    """

    least: float
    most: float = inf
    served: tuple[float, float] | None = None
    slider: tuple[float, float, float] | None = None
    label: str = ""
    zero: str = ""


def _number(default: Any, *limits: Any, **more: Any) -> Any:
    return field(default=default, metadata={"limits": OptionLimits(*limits, **more)})


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded. Raises UserError for values that mean nothing.

    Attributes:
        max_new_tokens: length of the answer at most, in tokens, with all tokens of each [RET].
        min_tokens: no [RET] is generated before so many tokens.
        min_new_tokens: no </s> is generated before so many tokens, as in Hugging Face's `generate`.
        temperature: temperature of sampling; 0 is greedy, and top_p and top_k then count for nothing.
        top_p: sample among the likeliest tokens that together have this probability.
        top_k: sample among this many tokens; 0 for all.
        repetition_penalty: divides the logits of tokens that the answer holds already; 1 leaves them.
        stop: texts at which the answer ends; they are not part of it.
        seed: seed of sampling; row i of a batch samples with seed + i. Without one, a seed is drawn.
        ret_bias: added to the logit of [RET]; higher gives more images.
        authors_ret_scale: multiplies the logit of [RET] first, as the released code does; it moves a negative logit the
            wrong way.
        max_images: [RET] in an answer at most; 0 for text alone.
        images_per_ret: images for each [RET].
        end_at_image: the answer ends at its last [RET]; training shows no text after it.
        use_cache: keep keys and values. --no-use-cache: run the whole sequence again for every token, with nothing cached.
        half_weights: on a CPU, generate faster with a float16 copy of the language model's weights, which takes half their
            memory; tokens may change. No effect where PyTorch has no kernel for it.
    """

    max_new_tokens: int = _number(32, 1, served=(1, 512), slider=(1, 128, 1), label="Length")
    min_tokens: int = _number(0, 0, served=(0, 512))
    min_new_tokens: int = _number(0, 0, served=(0, 512))
    temperature: float = _number(0.0, 1e-3, 100, served=(0, 10), slider=(0, 2, 0.1), label="Temperature", zero="greedy")
    top_p: float = _number(1.0, 1e-6, 1, served=(1e-6, 1))
    top_k: int = _number(0, 0, served=(0, 100_000))
    repetition_penalty: float = _number(1.0, 1e-3, 1e6, served=(0.1, 10))
    stop: Sequence[str] = ()
    seed: int | None = _number(None, 0, 2**63, served=(0, 2**32 - 1))
    ret_bias: float = _number(0.0, -1e6, 1e6, served=(-1e4, 1e4), slider=(-20, 20, 0.5), label="[RET] bias")
    authors_ret_scale: float = _number(1.0, -1e6, 1e6)
    max_images: int = _number(1, 0, served=(0, 4))
    images_per_ret: int = _number(1, 1, 1000, served=(1, 8), slider=(1, 8, 1), label="Images for each [RET]")
    end_at_image: bool = False
    use_cache: bool = True
    half_weights: bool = False

    def __post_init__(self) -> None:
        for name, limits in LIMITS.items():
            value = getattr(self, name)
            if (value is None and name == "seed") or (value == 0 and limits.zero):
                continue
            if is_whole(name):
                check_whole(name, value, limits.least, limits.most)
            else:
                check_real(name, value, limits.least, limits.most, f"0 ({limits.zero}) or " if limits.zero else "")
        for name in ("min_tokens", "min_new_tokens"):
            check_whole(name, getattr(self, name), 0, self.max_new_tokens)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"stop is {self.stop!r}; it must be texts that are not empty")
        object.__setattr__(self, "stop", tuple(stop))


LIMITS: dict[str, OptionLimits] = {f.name: f.metadata["limits"] for f in fields(Decoding) if f.metadata}
HELP = {p.arg_name: " ".join((p.description or "").split()) for p in parse(Decoding.__doc__ or "").params}
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Decoding)}


def served(name: str) -> tuple[Any, Any]:
    """Smallest and largest value of an option in a request. Raises LookupError or ValueError where requests have it not."""
    kind: Any = int if is_whole(name) else float
    least, most = (kind(bound) for bound in LIMITS[name].served or ())
    return least, most


def is_whole(name: str) -> bool:
    """Whether an option is a whole number."""
    return name == "seed" or type(DEFAULTS[name]) is int
