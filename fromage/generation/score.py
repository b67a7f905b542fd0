"""Scoring: the log-likelihood of texts that continue an interleaved prompt, and of the text of whole prompts.

In `score` the prompt runs once and its keys and values are cached; the continuations attend to them, packed without padding.
VisDial's answer ranking uses it: its two protocols, corrected and as released, differ in `unshifted`; see
fromage.evals.visdial.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fromage.checks import as_list, check_whole
from fromage.errors import UserError
from fromage.models.fromage import Fromage
from fromage.models.language_model import LanguageModel
from fromage.models.packed_attention import CausalAttention, Continuations
from fromage.models.packed_layout import PackedLayout, to_device
from fromage.models.prompts import Prompt, embed_prompts, listed

CHUNK = 512  # tokens of continuations that run at a time; a longer continuation runs alone
LOGITS = 128  # positions whose logits are computed at a time


class LogLikelihoods(NamedTuple):
    """Log-likelihoods of C texts: their sums over tokens, (C,) float32 in nats, and numbers of tokens, (C,)."""

    total: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """(C,) log-likelihood per token."""
        return self.total / self.tokens  # (C,)


@torch.no_grad()
def score(model: Fromage, prompt: Prompt, continuations: Sequence[str], unshifted: bool = False) -> LogLikelihoods:
    """log p(continuation | prompt) of each continuation, in nats, over the vocabulary with [RET].

    Prompt and continuation are tokenised separately. unshifted: score the logits at each token with this token itself, not
    with the next one. That is no likelihood, but it is how the released code ranks VisDial's answers.

    Raises:
        UserError: a continuation is empty, or prompt and continuation do not fit the language model's positions.
    """
    rows = [model.tokenizer.encode(text) for text in as_list(continuations)]
    for number, row in enumerate(rows):
        if not row:
            raise UserError(f"continuation {number} is empty; there is nothing to score in it")
    counts = torch.tensor([len(row) for row in rows], dtype=torch.long, device=model.device)  # (C,)
    prompted = embed_prompts(model, [prompt], max(map(len, rows), default=0))
    shared = model.positions(prompted.ids, prompted.mask)  # (1, T)
    layout = PackedLayout([prompted.ids.shape[1]], model.device, None if shared is None else shared[0])
    prefix = CausalAttention(layout, keep=True)  # one sequence, S = 1
    last = model.lm.packed(prompted.embeds, layout.positions, prefix)[-1:]  # (1, T, d) -> (1, d)
    if unshifted:
        return LogLikelihoods(continuation_totals(model.lm, prefix, rows, rows), counts)
    first = torch.tensor([row[0] for row in rows], dtype=torch.long, device=model.device)  # (C,)
    rest = continuation_totals(model.lm, prefix, [row[:-1] for row in rows], [row[1:] for row in rows])
    return LogLikelihoods(model.lm.logits(last)[0].log_softmax(-1)[first] + rest, counts)  # (C,) each


@torch.no_grad()
def score_prompts(model: Fromage, prompts: Sequence[Prompt], batch_size: int = 64) -> LogLikelihoods:
    """log p of the text of whole prompts, in nats: of every token after an earlier one, images excepted.

    [image, "a cat"] is scored as captioning trains it: </s> after the image counts too, and of r [RET] tokens the first.
    batch_size: prompts that run at a time, packed. Raises UserError for a prompt without such a token, and as embed_prompts
    does.
    """
    check_whole("batch_size", batch_size, 1)
    prompts = listed(prompts)
    totals, counts = [torch.zeros(0, device=model.device)], [torch.zeros(0, dtype=torch.long, device=model.device)]
    for begin in range(0, len(prompts), batch_size):
        batch = embed_prompts(model, prompts[begin : begin + batch_size])
        shared = model.positions(batch.ids, batch.mask)  # (B, T)
        layout = PackedLayout(batch.mask.sum(1).tolist(), model.device, None if shared is None else shared[batch.mask])
        hidden = model.lm.packed(batch.embeds[batch.mask].unsqueeze(0), layout.positions, CausalAttention(layout))  # (N, d)
        given = torch.tensor(model.tokenizer.never_predicted, device=model.device)
        scored = ~torch.isin(batch.ids, given)[:, 1:] & batch.mask[:, :-1]  # (B, T - 1): a token after another
        if not bool((tokens := scored.sum(1)).all()):
            raise UserError("a prompt to score has no text after its first token; write at least one word")
        before = F.pad(scored, (0, 1))[batch.mask]  # (N,): the tokens in front of those
        rows = scored.nonzero()[:, 0]  # (S,)
        likelihoods = log_likelihoods(model.lm, hidden[before], batch.ids[:, 1:][scored])  # (S,)
        totals.append(torch.zeros(len(tokens), device=model.device).index_add_(0, rows, likelihoods))
        counts.append(tokens)
    return LogLikelihoods(torch.cat(totals), torch.cat(counts))  # (C,) each


def continuation_totals(
    lm: LanguageModel, prefix: CausalAttention, rows: list[list[int]], targets: list[list[int]]
) -> Tensor:
    """(C,) sums of the log-likelihoods of each row's targets; target i is predicted after token i of the row."""
    device = prefix.layout.positions.device
    total = torch.zeros(len(rows), device=device)  # (C,)
    for some in chunks([len(row) for row in rows]):
        lengths = [len(rows[i]) for i in some]
        flat = [[i, token, target] for i in some for token, target in zip(rows[i], targets[i], strict=True)]
        owner, ids, wanted = to_device(flat, device).T  # (N, 3) -> (N,) each
        attend = Continuations(prefix, lengths, device)
        hidden = lm.packed(lm.embed(ids.unsqueeze(0)), attend.positions, attend)  # (N, d)
        total.index_add_(0, owner, log_likelihoods(lm, hidden, wanted))
    return total


def chunks(lengths: list[int]) -> Iterator[list[int]]:
    """Groups of sequences, by number, of at most CHUNK tokens or one sequence; empty sequences are left out."""
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
        logits = lm.logits(h)  # (c, V + 1 + r)
        out.append(logits.gather(1, t.unsqueeze(1)).squeeze(1) - logits.logsumexp(1))  # (c,)
    return torch.cat(out)  # (N,)
