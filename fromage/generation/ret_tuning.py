"""Tuning the [RET] bias: an image where a message asks for one, and none elsewhere.

FROMAGe was trained on captions, not on conversations, so in a chat its [RET] comes too seldom or too often. With a bias b an
answer holds an image exactly where the margin of [RET], the most by which its logit exceeds all others along the answer
without images, is at least -b: one number per message, and the bias is where two kinds of messages part. This holds for
greedy answers, for one style and system prompt, and is off by what a repetition penalty changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fromage.errors import UserError
from fromage.generation.chat import Chat
from fromage.generation.decoding import end_ids
from fromage.generation.generate import generate
from fromage.generation.options import Decoding
from fromage.generation.preset import Preset
from fromage.io import read_json
from fromage.models.fromage import Fromage
from fromage.models.prompts import Prompt, embed_prompts

IMAGES, WORDS = "images", "words"  # kinds of messages: those that ask for an image, and others
BATCH = 25  # answers that are generated at a time
LEAST = 4  # messages of a kind, half of which judge
FLOOR = -1e4  # the margin where no place of the answer may hold [RET]; the bias that a request over HTTP may have at most

Shares = dict[str, float]  # of answers that bring an image, by kind of message, in percent


class RetTuning(NamedTuple):
    """A bias and what it does.

    Attributes:
        bias: to be added to the logit of [RET].
        accuracy: balanced accuracy of the bias on the messages that chose it, in percent; 50 is chance.
        before, after: share of answers to the other messages that bring an image, without a bias and with this one.
    """

    bias: float
    accuracy: float
    before: Shares
    after: Shares

    @property
    def judged(self) -> float:
        """Balanced accuracy on the other messages, in percent."""
        return (self.after[IMAGES] + 100 - self.after[WORDS]) / 2


def read_messages(path: Path) -> dict[str, list[str]]:
    """A file {"images": [message that asks for an image, ...], "words": [other message, ...]}.

    Raises UserError where it is missing, or something else.
    """
    wanted = f'a file {{"{IMAGES}": [message, ...], "{WORDS}": [message, ...]}}'
    content = read_json(path, wanted)
    found = {kind: content.get(kind) if isinstance(content, dict) else None for kind in (IMAGES, WORDS)}
    for kind, texts in found.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"{path}: {kind} must be a list of texts that are not empty; name {wanted}")
        if len(texts) < LEAST:
            raise UserError(f"{path}: {len(texts)} {kind} are too few; give {LEAST} at least, half of which judge")
    return found  # type: ignore[return-value]


def tune_ret(model: Fromage, messages: Mapping[str, Sequence[str]], preset: Preset) -> RetTuning:
    """The bias that parts messages best, chosen on the first, third ... of each kind, and judged on the others.

    Args:
        messages: those that ask for an image, and others, as `read_messages` gives them; each is a chat's first turn.
        preset: style, system prompt and decoding of the chat; its own bias and temperature count for nothing.

    Raises UserError for a model that never says [RET], and as Chat and generate do.
    """
    if model.pools_last_word:
        raise UserError("a model of pooling last never says [RET], so there is no bias to tune; train one of pooling ret")
    chat = Chat(model, None, preset.decoding, preset.style, preset.system)
    stop = (*preset.decoding.stop, *chat.style.stop)
    decoding = replace(preset.decoding, stop=stop, temperature=0.0, ret_bias=0.0)
    prompts = {kind: [chat.prompt(text) for text in messages[kind]] for kind in (IMAGES, WORDS)}
    cut, accuracy = best_cut(*(ret_margins(model, some[::2], decoding) for some in prompts.values()))
    bias = round(-cut, 4)
    others = {kind: some[1::2] for kind, some in prompts.items()}
    before, after = (
        {kind: _share(model, some, replace(decoding, ret_bias=value)) for kind, some in others.items()}
        for value in (0.0, bias)
    )
    return RetTuning(bias, 100 * accuracy, before, after)


def best_cut(above: Tensor, below: Tensor) -> tuple[float, float]:
    """Where two sets of numbers part best, and the balanced accuracy of this cut, 0 to 1.

    The cut is the middle of a gap between two neighbouring numbers; of equally good gaps that of the widest.
    """
    edges = torch.cat([above, below]).unique()  # (n,), sorted
    cuts = torch.cat([edges[:1] - 1, (edges[:-1] + edges[1:]) / 2]).unsqueeze(1)  # (n, 1); the first lies below all
    widths = torch.cat([torch.zeros_like(edges[:1]), edges.diff()])  # (n,)
    right = ((above >= cuts).float().mean(1) + (below < cuts).float().mean(1)) / 2  # (n,)
    best = int(widths.masked_fill(right < right.max() - 1e-6, -1).argmax())
    return float(cuts[best]), float(right[best])


@torch.no_grad()
def ret_margins(model: Fromage, prompts: Sequence[Prompt], decoding: Decoding) -> Tensor:
    """(N,) the most by which the logit of [RET] exceeds all others, over the places of each answer where it may come."""
    answers = generate(model, prompts, replace(decoding, max_images=0, temperature=0.0), batch_size=BATCH)
    return torch.stack([_margin(model, *pair, decoding) for pair in zip(prompts, (a.ids for a in answers), strict=True)])


def _margin(model: Fromage, prompt: Prompt, answer: list[int], decoding: Decoding) -> Tensor:
    """The margin of one answer, by its ids; a scalar."""
    tokenizer, batch = model.tokenizer, embed_prompts(model, [prompt])
    said = torch.tensor([answer], dtype=torch.long, device=model.device)  # (1, n)
    ids = torch.cat([batch.ids, said], 1)  # (1, T + n)
    mask, embeds = torch.ones_like(ids, dtype=torch.bool), torch.cat([batch.embeds, model.embed(said)], 1)
    hidden = model.lm(embeds, mask, model.positions(ids, mask))[0, batch.ids.shape[1] - 1 :]  # (1, T + n, d) -> (n + 1, d)
    logits = model.lm.logits(hidden)  # (n + 1, V + 1 + r)
    logits[: decoding.min_new_tokens, end_ids(model, decoding.stop)] = -torch.inf
    ret = logits[:, tokenizer.ret_id] * decoding.authors_ret_scale  # (n + 1,)
    logits[:, tokenizer.ret_ids] = -torch.inf
    stopped = any(stop in tokenizer.decode(answer) for stop in decoding.stop)  # so that the place after is not reached
    last = min(len(answer) - stopped, decoding.max_new_tokens - len(tokenizer.ret_ids))
    margins = (ret - logits.amax(1))[decoding.min_tokens : max(last + 1, 0)]  # (places,)
    return torch.cat([margins, margins.new_full((1,), FLOOR)]).max()


def _share(model: Fromage, prompts: Sequence[Prompt], decoding: Decoding) -> float:
    """Share of the answers that bring an image, in percent."""
    shown = [model.tokenizer.ret_id in answer.ids for answer in generate(model, prompts, decoding, batch_size=BATCH)]
    return 100 * sum(shown) / len(shown)
