"""One training step of Octopus: recognise, match, answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fromage.octopus.examples import Example
from fromage.octopus.matching import Objects, set_loss
from fromage.octopus.model import Octopus


class GroundingBatch(NamedTuple):
    """A batch of prompts about images and the answers to be learned. Pixels and patches are never both there."""

    examples: list[Example]
    ids: Tensor  # (B, T) int64, left-padded; <|image|> and <|query|> in their places
    mask: Tensor  # (B, T) bool
    answers: Tensor  # (B, A) int64, right-padded: text, <di> for the i-th object, </s>
    targets: Tensor  # (B, A) bool, no padding
    objects: Objects
    pixels: Tensor | None  # (B, 3, H, W) uint8
    patches: Tensor | None  # (B, P, m) stored patch features

    @property
    def keys(self) -> list[str]:
        """The examples' names."""
        return [example.key for example in self.examples]


@dataclass(frozen=True)
class StepOutput:
    """What a step computes; sums are weighted as in loss.

    Attributes:
        answer_loss: cross-entropy of the answers' tokens.
        set_loss: that of matching and recognition, 0 without queries.
        parts: of the latter's last decoder layer, by name.
        right: share of the answers' tokens foreseen.
    """

    answer_loss: Tensor
    set_loss: Tensor
    parts: dict[str, Tensor]
    right: Tensor

    @property
    def loss(self) -> Tensor:
        """Their sum."""
        return self.answer_loss + self.set_loss


def image_patches(model: Octopus, lesson: GroundingBatch) -> Tensor:
    """(B, P, m): stored ones where the batch has them, else the tower's."""
    return lesson.patches.to(model.device) if lesson.patches is not None else model.vision(lesson.pixels)


def octopus_step(model: Octopus, lesson: GroundingBatch) -> StepOutput:
    """Read the prompts, match what was recognised with what is there, and judge the answers that point at the matches.

    The prompts are read once, and the answers, known only after the matching, go on from their keys and values.
    """
    patches = image_patches(model, lesson)
    embeds = model.embed(lesson.ids, model.prefix(patches))  # (B, T, d)
    reading = model.read(lesson.ids, lesson.mask, embeds, patches)
    recognition, answers = embeds.new_zeros((), dtype=torch.float32), lesson.answers
    parts: dict[str, Tensor] = {}
    if reading.found is not None:
        recognition, matched, parts = set_loss(reading.found, lesson.objects)
        answers = named(answers, matched, model.tokenizer.row_ids[0])
    after = model.extend(reading, answers[:, :-1]) if answers.shape[1] > 1 else embeds[:, :0]  # (B, A - 1, d)
    hidden = torch.cat([reading.hidden.unsqueeze(1), after], 1)  # (B, A, d), each of which foretells a token
    logits = model.logits(hidden, reading)[lesson.targets]  # (M, V + 2 + N), of M tokens
    wanted = answers[lesson.targets]  # (M,)
    right = (logits.argmax(-1) == wanted).float().mean()
    return StepOutput(F.cross_entropy(logits, wanted), recognition, parts, right)


def named(answers: Tensor, matched: Tensor, first: int) -> Tensor:
    """(B, A) answers in which <di> is the i-th object -> <dj>, j the query that is matched (B, K) with it."""
    if not matched.shape[1]:
        return answers
    pointing = answers >= first
    places = (answers - first).clamp(0, matched.shape[1] - 1)  # (B, A)
    return torch.where(pointing, first + matched.gather(1, places), answers)
