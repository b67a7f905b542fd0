"""Conditions and target captions written by a causal language model from captions alone, and which of them are kept.

A few examples show the model what to do. It goes on after "Caption: ... Change:" with a condition, and after that and
"New caption:" with the caption of the image that the change would make: two passes, so that no model can leave the form.
Li et al. (MCL, ICML 2024) have such tuples written by Llama-2; prompt, examples and filters here are our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from fromage.checks import check_real, check_whole
from fromage.data.padding import pad
from fromage.errors import BrokenSample
from fromage.models.language_model import LanguageModel

CAPTION, CHANGE, TARGET = "Caption:", "Change:", "New caption:"
EXAMPLES = (
    ("a grey cat asleep on a sofa", "outdoors, on a wooden bench", "a grey cat asleep on a wooden bench outdoors"),
    ("two men play chess in a park", "but at night, under a lamp", "two men play chess in a park at night, under a lamp"),
    ("a red bicycle leans on a wall", "make the bicycle blue", "a blue bicycle leans on a wall"),
    ("a girl in a coat walks in the rain", "with a small dog", "a girl in a coat walks a small dog in the rain"),
    ("a bowl of soup on a table", "and bread beside it", "a bowl of soup and some bread on a table"),
)
MOST = {"condition": 20, "target caption": 40}  # words
LITTLE = "a an the of in on at to and with is are by it its as for from be but this that"  # words that say little


class Written(NamedTuple):
    """What the model wrote for a caption, one line each."""

    condition: str
    target: str


@dataclass(frozen=True)
class Sampling:
    """How the model writes.

    Attributes:
        batch_size: captions at a time.
        max_new_tokens: of a condition, and of a target caption, at most.
        temperature: of sampling; 0 takes the most likely token each time.
        top_p: probability that the most likely tokens, which are drawn from, have together, 0 to 1.
        seed: seed; each batch is drawn from it and its number, so an interrupted run goes on as it would have.
    """

    batch_size: int = 16
    max_new_tokens: int = 40
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        for name in ("batch_size", "max_new_tokens"):
            check_whole(name, getattr(self, name), 1)
        check_real("temperature", self.temperature, 0, 100)
        check_real("top_p", self.top_p, 0, 1)


def prompt_of(caption: str) -> str:
    """The examples, and a caption that waits for its change."""
    shown = [f"{CAPTION} {before}\n{CHANGE} {change}\n{TARGET} {after}\n" for before, change, after in EXAMPLES]
    return "\n".join([*shown, f"{CAPTION} {' '.join(caption.split())}\n{CHANGE}"])


class TupleWriter:
    """A language model that writes after prompts; it was loaded without added tokens."""

    def __init__(self, lm: LanguageModel, sampling: Sampling) -> None:
        self.lm, self.sampling = lm, sampling
        size = lm.tokenizer.vocab_size
        pieces = lm.tokenizer.hf.batch_decode([[i] for i in range(size)])
        device = lm.hf.get_input_embeddings().weight.device
        self.breaks = torch.tensor(["\n" in piece for piece in pieces], device=device)  # (V,) tokens with a line end

    @torch.inference_mode()
    def write(self, captions: Sequence[str], number: int) -> list[Written | None]:
        """What the model writes for the captions of batch `number`; None for one too long for its positions."""
        device = self.breaks.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.sampling.seed * 1_000_003 + number)
            prompts = [prompt_of(caption) for caption in captions]
            fits = [self._fits(prompt) for prompt in prompts]
            prompts = [prompt if fit else prompt_of("") for prompt, fit in zip(prompts, fits, strict=True)]
            conditions = self._lines(prompts)
            targets = self._lines([f"{p} {c}\n{TARGET}" for p, c in zip(prompts, conditions, strict=True)])
        return [Written(c, t) if fit else None for c, t, fit in zip(conditions, targets, fits, strict=True)]

    def _fits(self, prompt: str) -> bool:
        """Whether the language model has positions for a prompt and all that is written after it."""
        most, tokenizer = self.lm.max_length, self.lm.tokenizer
        after = 2 * self.sampling.max_new_tokens + len(tokenizer.encode(f" \n{TARGET}"))
        return most is None or len(tokenizer.start()) + len(tokenizer.encode(prompt)) + after <= most

    def _lines(self, prompts: Sequence[str]) -> list[str]:
        """What the model says after each prompt, to the end of the line."""
        lm, how = self.lm, self.sampling
        rows = [lm.tokenizer.start() + lm.tokenizer.encode(prompt) for prompt in prompts]
        ids, mask = (x.to(self.breaks.device) for x in pad(rows, lm.tokenizer.pad_id, "left"))  # (B, T) each
        options: dict[str, Any] = {"do_sample": how.temperature > 0, "pad_token_id": lm.tokenizer.pad_id}
        if how.temperature > 0:
            options |= {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
        stop = StoppingCriteriaList([LineEnd(self.breaks, ids.shape[1])])
        found = lm.hf.generate(
            ids, attention_mask=mask.long(), max_new_tokens=how.max_new_tokens, stopping_criteria=stop, **options
        )  # (B, T + t)
        said = [lm.tokenizer.decode(row) for row in found[:, ids.shape[1] :].tolist()]
        return [text.partition("\n")[0].strip() for text in said]


class LineEnd(StoppingCriteria):
    """Ends a row once its line has ended."""

    def __init__(self, breaks: Tensor, start: int) -> None:
        """breaks: (V,) bool, the tokens with a line end. start: tokens of the prompts."""
        self.breaks, self.start = breaks, start

    def __call__(self, input_ids: Tensor, scores: Any, **named: Any) -> Tensor:  # type: ignore[override]
        """(B, T) ids -> (B,) bool."""
        written = input_ids[:, self.start :].clamp(max=len(self.breaks) - 1)  # (B, t)
        return self.breaks[written].any(1)  # (B, t) -> (B,)


def usable(caption: str, written: Written | None) -> Written:
    """What the model wrote for a caption, where it is of use. Raises BrokenSample with the cause where it is not."""
    if written is None:
        raise BrokenSample("caption too long for the language model")
    condition, target = written
    for name, text in (("condition", condition), ("target caption", target)):
        if not _words(text):
            raise BrokenSample(f"empty {name}")
        if len(text.split()) > MOST[name]:
            raise BrokenSample(f"{name} of more than {MOST[name]} words")
        if any(label in text for label in (CAPTION, CHANGE, TARGET)):
            raise BrokenSample("not in the form of the examples")
    before, change, after = (_telling(text) for text in (caption, condition, target))
    if _words(target) == _words(caption) or not after - before:
        raise BrokenSample("nothing is new in the target caption")
    if not after & before:
        raise BrokenSample("nothing of the caption is left in the target caption")
    if not (after - before) & change:
        raise BrokenSample("the condition does not say what is new")
    if after <= change:
        raise BrokenSample("the condition says all of the target caption")
    return written


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _telling(text: str) -> set[str]:
    """The words of a text that say something; a plural counts as its singular."""
    return {word.removesuffix("s") for word in _words(text)} - {word.removesuffix("s") for word in LITTLE.split()}
