"""The training step of Octopus: recognise, match, answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fromage.octopus.branches import Rows
from fromage.octopus.examples import Example
from fromage.octopus.matching import Matcher, Objects, detection_loss, match, nearest
from fromage.octopus.model import Octopus, Prefill
from fromage.training.losses import device_weight


class GroundingBatch(NamedTuple):
    """Images, one a row, prompts about them as branches of the row (fromage.octopus.branches), and their answers.

    The prompts are read first. A branch's last answer is fed after them, once it is known which queries it points at;
    the answers of earlier turns are text, and stand within the prompts. It has either pixels or patches.
    """

    examples: list[Example]  # E, row by row
    prompts: Rows  # M tokens; includes <|image|> and <|query|> tokens
    answers: Tensor  # (Y,) int64, the tokens of all answers, one after another: text, <di> for the i-th object, </s>
    owners: Tensor  # (Y,) int64: the example of each
    at: Tensor  # (Y,) int64: which of M + F hidden states predicts each
    fed: Rows  # F tokens after the prompts; their ids say which of the Y tokens of answers they are
    query_index: Tensor  # (E, N) int64: which of the M tokens are the object queries of each prompt; E = 0: there are none
    row_of_prompt: Tensor  # (E,) int64: the row of each prompt that has queries
    objects: Objects
    pixels: Tensor | None  # (B, 3, H, W) uint8
    patches: Tensor | None  # (B, P, m) stored patch features

    def to(self, device: torch.device) -> GroundingBatch:
        """The same batch with tensors and boxes on the device."""
        moved: Any = {
            name: field.to(device, non_blocking=True)
            for name, field in self._asdict().items()
            if isinstance(field, Tensor | Objects | Rows)
        }
        return self._replace(**moved)

    @property
    def keys(self) -> list[str]:
        """The keys of the examples."""
        return [example.key for example in self.examples]


@dataclass(frozen=True)
class GroundingOutput:
    """The losses of a step, all scalars. Over devices that train together, their mean is that of all targets and objects.

    Attributes:
        answer_loss: cross-entropy of the answers' tokens (Octopus, equation 5).
        detection_loss: detection loss (equation 3); 0 without queries.
        parts: score, l1 and giou loss of the last decoder layer.
        token_accuracy: share of the answers' tokens with the highest logit.
    """

    answer_loss: Tensor
    detection_loss: Tensor
    parts: dict[str, Tensor]
    token_accuracy: Tensor

    @property
    def loss(self) -> Tensor:
        """The sum of both losses."""
        return self.answer_loss + self.detection_loss


def image_patches(model: Octopus, batch: GroundingBatch) -> Tensor:
    """(B, P, m) patch features: the stored ones if the batch has them, else computed by the tower."""
    return batch.patches.to(model.device) if batch.patches is not None else model.vision(batch.pixels)


def read_prompts(model: Octopus, batch: GroundingBatch, patches: Tensor) -> Prefill:
    """Run the prompts of a batch about images with patch features (B, P, m)."""
    embeds = model.embed(batch.prompts.ids.unsqueeze(0), model.visual_prefix(patches))[0]  # (M, d)
    return model.read(batch.prompts.layout(), embeds, patches, batch.query_index, batch.row_of_prompt)


def octopus_step(model: Octopus, batch: GroundingBatch, matcher: Matcher = match) -> GroundingOutput:
    """Read the prompts, and score answers that point at the queries with the nearest boxes (equation 4).

    Prompts are read once. The answers are known after the detection only; they continue from the cached keys and values.
    The loss and its gradients are those of the same examples in rows of their own. The layout is known on the host, which
    waits for the device in matcher alone.
    """
    patches = image_patches(model, batch)
    prefill = read_prompts(model, batch, patches)
    recognition, answers = prefill.states.new_zeros((), dtype=torch.float32), batch.answers
    parts: dict[str, Tensor] = {}
    if prefill.found is not None:
        recognition, parts = detection_loss(prefill.found, batch.objects, matcher)
        best = nearest(prefill.found.boxes[-1], batch.objects)  # (E, K)
        answers = point_at_queries(answers, batch.owners, best, model.tokenizer.trained_ids[0])
    hidden = prefill.states  # (M, d)
    if len(batch.fed.ids):
        after = model.read_answers(prefill, answers[batch.fed.ids], batch.fed.layout())  # (F, d)
        hidden = torch.cat([hidden, after])  # (M + F, d)
    logits = model.logits(hidden.index_select(0, batch.at), prefill)  # (Y, V + 2 + N)
    token_accuracy = (logits.argmax(-1) == answers).float().mean()
    answer_loss = F.cross_entropy(logits, answers) * device_weight(len(answers), logits.device)
    return GroundingOutput(answer_loss, recognition, parts, token_accuracy)


def point_at_queries(answers: Tensor, owners: Tensor, query_of_object: Tensor, first: int) -> Tensor:
    """(Y,) tokens of answers in which <di> is object i -> the same in which <dj> is its query j.

    owners: (Y,), the example of each token. query_of_object: (E, K). first: the id of <d0>.
    """
    if not query_of_object.shape[1]:
        return answers
    objects = (answers - first).clamp(0, query_of_object.shape[1] - 1)  # (Y,); of no meaning where a token is text
    return torch.where(answers >= first, first + query_of_object[owners, objects], answers)  # (Y,)
