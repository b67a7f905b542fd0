"""Decoding: the decoding loop, the [RET] bias and sampling; their options are in fromage.generation.options.

The loop is Hugging Face's `generate` with its key-value cache. We add rules for the [RET] logit (RetLogitsProcessor),
sampling with a random generator per row (GumbelSampler), and hooks that read each step's tokens and the hidden state at each
[RET]. A prompt has the same answer in a batch as alone. Of r [RET] tokens the first is chosen, and the others follow it by
rule.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fromage.generation.options import Decoding
from fromage.models.cpu_linear import halves_of, with_cpu_linears
from fromage.models.fromage import Fromage
from fromage.models.prompts import Prompts

GREEDY = Decoding()


@torch.no_grad()
def decode(
    model: Fromage,
    prompts: Prompts,
    decoding: Decoding,
    drafts: Sequence[PartialAnswer],
    first: int = 0,
    between: Callable[[], object] = lambda: None,
) -> None:
    """Decode a batch of prompts into its drafts until all are done.

    first: number of the first row, for its seed. between: called after each token, by the same thread; it may embed queries
    with the model, and decode nothing.
    """
    hf: Any = model.lm.hf
    if model.device.type == "cpu":
        hf = with_cpu_linears(hf, halves_of(hf) if decoding.half_weights else None)
    steps = Steps(drafts, between)
    with ExitStack() as hooks:
        hooks.enter_context(hf.get_output_embeddings().register_forward_pre_hook(steps.look))
        if model.config.stacked or not decoding.use_cache:
            sequences = Sequences(model, prompts, decoding.use_cache)
            hooks.enter_context(hf.register_forward_pre_hook(sequences, with_kwargs=True))
        hf.generate(
            inputs_embeds=prompts.embeds,
            attention_mask=prompts.mask.long(),
            max_new_tokens=decoding.max_new_tokens + 1,  # one more step, to read the hidden state of a [RET] that comes last
            min_new_tokens=decoding.min_new_tokens,
            do_sample=False,  # sampling and the repetition penalty are processors of ours
            logits_processor=LogitsProcessorList(processors(model, decoding, range(first, first + len(drafts)))),
            stopping_criteria=StoppingCriteriaList([steps]),
            pad_token_id=model.tokenizer.pad_id,
            eos_token_id=end_ids(model, decoding.stop) or None,
        )


class PartialAnswer:
    """One answer while it is decoded. It emits text as soon as it is final, and the hidden states (r, d) of each [RET].

    Attributes:
        ids: the tokens so far.
        done: whether it has ended; set from outside, it ends after the next token.
        cut: whether it ended for its length alone: at no end token, stop text or last image.
    """

    def __init__(self, model: Fromage, decoding: Decoding, emit: Callable[[str | Tensor], Any]) -> None:
        self.tokenizer, self.decoding, self.emit = model.tokenizer, decoding, emit
        self.ends = end_ids(model, decoding.stop)
        self.ids: list[int] = []
        self.done = self.cut = False
        self._states: list[Tensor] = []  # hidden states (d,) at the tokens of a [RET], until there are r
        self._words: list[int] = []  # tokens since the last [RET]
        self._said = 0  # characters of them that have been emitted

    def step(self, token: int, hidden: Tensor) -> None:
        """Take the next token. hidden: (d,) hidden state at the token before it, which matters if that was of a [RET]."""
        rets = self.tokenizer.ret_ids
        if self.ids and self.ids[-1] in rets:
            self._states.append(hidden.clone())
        if len(self._states) == len(rets):
            self.emit(torch.stack(self._states))  # (r, d)
            self._states, self._words, self._said = [], [], 0
            if self.decoding.end_at_image and self.ids.count(self.tokenizer.ret_id) >= self.decoding.max_images:
                self.done = True
                return
        if token in self.ends or self._full:
            self._say(everything=True)
            self.done, self.cut = True, token not in self.ends
            return
        self.ids.append(token)
        if token in rets:
            self._say(everything=True)
            return
        self._words.append(token)
        self._say(everything=self._full)
        if self._full and not self.done:  # done is never set to False: another thread may have set it to True
            self.done = self.cut = True

    @property
    def _full(self) -> bool:
        return len(self.ids) == self.decoding.max_new_tokens

    def _say(self, everything: bool) -> None:
        text = self.tokenizer.decode(self._words)
        ends = [place for stop in self.decoding.stop if (place := text.find(stop)) >= 0]
        if ends:
            text, self.done = text[: min(ends)], True
        elif not everything:
            text = certain(text, self.decoding.stop)
        if len(text) > self._said:
            self.emit(text[self._said :])
            self._said = len(text)


def certain(text: str, stop: Sequence[str]) -> str:
    """The part of a text that the next token cannot change: without half characters and beginnings of stop texts."""
    text = text.rstrip("\ufffd")
    held = [n for end in stop for n in range(1, len(end)) if text.endswith(end[:n])]
    return text[: len(text) - max(held, default=0)]


def end_ids(model: Fromage, stop: Sequence[str] = ()) -> list[int]:
    """The tokens that end an answer: the tokenizer's, the language model's generation config's, special ones among stop."""
    named = getattr(model.lm.hf.generation_config, "eos_token_id", None)
    ids = [model.tokenizer.eos_id, *(named if isinstance(named, list) else [named])]
    ids += (model.tokenizer.special_id(text) for text in stop)
    return sorted({i for i in ids if i is not None})


def processors(model: Fromage, decoding: Decoding, rows: range) -> Iterator[LogitsProcessor]:
    """The logits processors, in order. rows: numbers of the batch's rows, for their seeds."""
    if decoding.repetition_penalty != 1:
        yield RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty))
    if model.lm.cap is not None:  # Hugging Face caps the head's -inf too
        yield SuppressTokensLogitsProcessor(model.tokenizer.never_predicted, str(model.device))
    yield RetLogitsProcessor(model.tokenizer.ret_ids, replace(decoding, max_images=0) if model.pools_last_word else decoding)
    if decoding.temperature > 0:
        yield TemperatureLogitsWarper(float(decoding.temperature))
        if decoding.top_k:
            yield TopKLogitsWarper(decoding.top_k)
        if decoding.top_p < 1:
            yield TopPLogitsWarper(decoding.top_p)
        yield GumbelSampler(decoding.seed, rows, model.device)


class RetLogitsProcessor(LogitsProcessor):
    """Three rules for [RET]: its bias; where it may not be generated; and that its other r - 1 tokens follow the first.

    The released code multiplies the logit by a factor, which moves a negative logit the wrong way. Here a bias is added; the
    factor is available as authors_ret_scale. [RET] does not begin where the answer has no room for all r.
    """

    def __init__(self, ret_ids: list[int], decoding: Decoding) -> None:
        self.ret_ids, self.decoding = ret_ids, decoding

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids (B, t) of the answers so far, scores (B, V + 1 + r)."""
        first, after = self.ret_ids[0], torch.tensor(self.ret_ids[1:], device=ids.device)  # after (r - 1,)
        logit = scores[:, first] * self.decoding.authors_ret_scale + self.decoding.ret_bias  # (B,)
        barred = (ids == first).sum(1) >= self.decoding.max_images  # (B,)
        if not self.decoding.min_tokens <= ids.shape[1] <= self.decoding.max_new_tokens - len(self.ret_ids):
            barred = torch.ones_like(barred)
        scores[:, first] = logit.masked_fill(barred, -torch.inf)  # (B,)
        if not len(after) or not ids.shape[1]:
            return scores  # (B, V + 1 + r)
        due = ids[:, -1:] == after - 1  # (B, r - 1), since their ids are consecutive
        scores = scores.masked_fill(due.any(1, keepdim=True), -torch.inf)  # (B, V + 1 + r)
        scores[:, after] = torch.zeros_like(scores[:, after]).masked_fill(~due, -torch.inf)  # (B, r - 1)
        return scores  # (B, V + 1 + r)


class GumbelSampler(LogitsProcessor):
    """Sampling as the maximum of logits plus Gumbel noise, with a random generator per row.

    So the samples of a row depend neither on the global generator nor on the other rows of the batch.
    """

    def __init__(self, seed: int | None, rows: range, device: torch.device) -> None:
        seed = random.SystemRandom().getrandbits(40) if seed is None else seed
        self.generators = [torch.Generator(device).manual_seed(seed + row) for row in rows]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """scores (B, V + 1 + r) -> (B, V + 1 + r); -ln of an exponential variate is Gumbel noise."""
        noise = [torch.empty_like(scores[0]).exponential_(generator=generator) for generator in self.generators]
        return scores - torch.stack(noise).log()  # (B, V + 1 + r)


class Steps(StoppingCriteria):
    """Passes each step's tokens and hidden states to the drafts; the device is read once per step, for the tokens."""

    def __init__(self, drafts: Sequence[PartialAnswer], between: Callable[[], object] = lambda: None) -> None:
        self.drafts, self.between, self.thread, self.hidden = drafts, between, get_ident(), torch.empty(0)

    def look(self, head: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        """Hook before the output head, whose input is the hidden states (B, T, d). It ignores calls of other threads."""
        if get_ident() == self.thread:
            self.hidden = inputs[0][:, -1]  # (B, T, d) -> (B, d)

    def __call__(self, ids: Tensor, scores: Any, **options: Any) -> Any:
        """ids (B, t) of the answers so far -> (B,) bool, which rows are done."""
        for draft, token, hidden in zip(self.drafts, ids[:, -1].tolist(), self.hidden, strict=True):
            if not draft.done:
                draft.step(token, hidden)
        self.between()
        return torch.tensor([draft.done for draft in self.drafts], device=ids.device)  # (B,)


class Sequences:
    """Hook before the language model: what of prompt and answer so far it is to run, and what each token sees.

    Without a cache it runs all of it again; Hugging Face does not support this for prompts given as embeddings. Where [RET]
    is stacked, positions and mask are ours (Fromage.positions).
    """

    def __init__(self, model: Fromage, prompts: Prompts, use_cache: bool) -> None:
        self.model, self.use_cache, self.thread = model, use_cache, get_ident()
        self.ids, self.embeds, self.mask = prompts.ids, prompts.embeds, prompts.mask

    def __call__(self, hf: torch.nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Set positions and mask of the newest ids (B, 1); without a cache, replace them by the embeddings (B, T + t, d)."""
        if get_ident() != self.thread:
            return args, named
        new = named.get("input_ids")
        if new is not None:
            self.ids = torch.cat([self.ids, new], dim=1)  # (B, T + t)
            self.mask = F.pad(self.mask, (0, new.shape[1]), value=True)  # (B, T + t)
        positions = self.model.positions(self.ids, self.mask)  # (B, T + t)
        if positions is None:
            positions, mask = (self.mask.cumsum(1) - 1).clamp(min=0), self.mask.long()  # (B, T + t) each
        else:
            mask = self.model.lm.visible(positions, self.mask)  # (B, 1, T + t, T + t)
        if self.use_cache:
            newest = self.ids.shape[1] if new is None else new.shape[1]
            return args, named | {"attention_mask": mask[..., -newest:, :], "position_ids": positions[:, -newest:]}
        if new is not None:
            self.embeds = torch.cat([self.embeds, self.model.embed(new)], dim=1)  # (B, T + t, d)
        whole = {"inputs_embeds": self.embeds, "attention_mask": mask, "position_ids": positions}
        return args, named | {"input_ids": None, "past_key_values": None, "use_cache": False} | whole
