"""Scoring: the log-likelihood of texts that continue one interleaved prompt.

The prompt runs once and leaves its keys and values; the continuations run against these, packed without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fromage.errors import UserError
from fromage.models.fromage import Fromage
from fromage.models.language_model import LanguageModel
from fromage.models.packed_attention import Branches, Causal, Rows, to_device
from fromage.models.prompts import Prompt, embed_prompts

CHUNK = 512  # tokens of continuations that run at a time, unless one alone is longer
LOGITS = 128  # positions whose logits exist at a time


class Scores(NamedTuple):
    """Log-likelihoods of C continuations, summed over their tokens (C,) float32, and how many these are (C,)."""

    total: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """(C,) per token."""
        return self.total / self.tokens


@torch.no_grad()
def score(model: Fromage, prompt: Prompt, continuations: Sequence[str], unshifted: bool = False) -> Scores:
    """log p(continuation | prompt) in nats, for each, over the vocabulary with [RET].

    The sequence judged is the ids of the prompt followed by those of the continuation, each tokenised by itself.
    unshifted judges the logits at each token against this very token, not the one that follows: not a likelihood, but what
    the released code ranks VisDial's answers by.

    Raises:
        UserError: a continuation holds no token, or prompt and continuation are longer than the language model's positions.
    """
    rows = [model.tokenizer.encode(text) for text in continuations]
    for number, row in enumerate(rows):
        if not row:
            raise UserError(f"continuation {number} is empty; there is nothing to score in it")
    counts = torch.tensor([len(row) for row in rows], dtype=torch.long, device=model.device)  # (C,)
    prompted = embed_prompts(model, [prompt], max(map(len, rows), default=0))
    prefix = Causal(Rows([prompted.ids.shape[1]], model.device), keep=True)
    last = model.lm.packed(prompted.embeds, prefix.rows.positions, prefix)[-1:]  # (1, d)
    if unshifted:
        return Scores(branch_totals(model.lm, prefix, rows, rows), counts)
    first = torch.tensor([row[0] for row in rows], dtype=torch.long, device=model.device)  # (C,)
    rest = branch_totals(model.lm, prefix, [row[:-1] for row in rows], [row[1:] for row in rows])
    return Scores(model.lm.logits(last)[0].log_softmax(-1)[first] + rest, counts)


def branch_totals(lm: LanguageModel, prefix: Causal, rows: list[list[int]], targets: list[list[int]]) -> Tensor:
    """(C,) log-likelihoods of each row's targets, summed: of each where the token at its place is the last one read."""
    device = prefix.rows.positions.device
    total = torch.zeros(len(rows), device=device)
    for some in chunks([len(row) for row in rows]):
        lengths = [len(rows[i]) for i in some]
        flat = [[i, token, target] for i in some for token, target in zip(rows[i], targets[i], strict=True)]
        owner, ids, wanted = to_device(flat, device).T  # (N,) each
        positions = prefix.rows.width + Rows(lengths, device).positions  # (N,)
        hidden = lm.packed(lm.embed(ids.unsqueeze(0)), positions, Branches(prefix, lengths, device))  # (N, d)
        total.index_add_(0, owner, log_likelihoods(lm, hidden, wanted))
    return total


def chunks(lengths: list[int]) -> Iterator[list[int]]:
    """Numbers of the sequences that run together, CHUNK tokens or one sequence at a time; empty ones are left out."""
    some: list[int] = []
    size = 0
    for i, length in enumerate(lengths):
        if some and size + length > CHUNK:
            yield some
            some, size = [], 0
        if length:
            some.append(i)
            size += length
    if some:
        yield some


def log_likelihoods(lm: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """(N, d) hidden states and (N,) targets -> (N,) log-likelihoods."""
    out = []
    for h, t in zip(hidden.split(LOGITS), targets.split(LOGITS), strict=True):
        logits = lm.logits(h)  # (c, V + 2)
        out.append(logits.gather(1, t.unsqueeze(1)).squeeze(1) - logits.logsumexp(1))
    return torch.cat(out)
