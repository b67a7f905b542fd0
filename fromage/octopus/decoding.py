"""Decoding of Octopus: an image and an instruction -> text that points at boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fromage.checks import check_whole
from fromage.errors import UserError
from fromage.models.packed_layout import PackedLayout
from fromage.models.prompts import ImageInput, Prompts, embed_prompts
from fromage.octopus.answers import GroundedAnswer, read_indexed, read_text
from fromage.octopus.branches import query_places
from fromage.octopus.model import Octopus, Prefill
from fromage.octopus.sources import check_question

MAX_NEW_TOKENS = 128


def instruction(text: str, question: str = "where is {}?") -> str:
    """The instruction for a text: the text itself if it ends in . ? or !, else the question with the text in place of {}.

    Raises UserError for an empty text, and for a question that does not contain {} exactly once.
    """
    if not (text := text.strip()):
        raise UserError("nothing is asked; write what is meant, such as: the small star left of the ring")
    question = check_question(question)
    return text if text.endswith(("?", ".", "!")) else question.replace("{}", text)


@torch.no_grad()
def ground(
    model: Octopus,
    asked: Sequence[tuple[ImageInput | None, str]],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 32,
) -> list[GroundedAnswer]:
    """Greedy answers to (image, instruction) pairs.

    An image can be given as its patch features (P, m); without one (None), nothing is looked for. Prompts are read once;
    answers continue from the cached keys and values. Raises UserError for prompts that are too long and for images that
    cannot be opened or fetched.
    """
    check_whole("batch_size", batch_size, 1)
    check_whole("max_new_tokens", max_new_tokens, 1)
    answers: dict[int, GroundedAnswer] = {}
    for ask in (True, False):  # either all prompts of a batch have queries, or none
        numbers = [i for i, (image, _) in enumerate(asked) if (image is not None) == ask]
        for start in range(0, len(numbers), batch_size):
            some = numbers[start : start + batch_size]
            prompts = [model.prompt(*asked[i], ask) for i in some]
            embedded = embed_prompts(model, prompts, max_new_tokens)
            patches = embedded.features[[rows[-1] for rows in embedded.image_rows if rows]]  # (B, P, m), or of no prompt
            prefill = read_batch(model, embedded, patches)
            answers |= zip(some, grounded(model, prefill, decode(model, prefill, max_new_tokens)), strict=True)
    return [answers[i] for i in range(len(asked))]


def read_batch(model: Octopus, prompts: Prompts, patches: Tensor) -> Prefill:
    """Run prompts, one a row, about images with patch features (B, P, m); of prompts without images (0, P, m)."""
    ids, layout = prompts.ids[prompts.mask], PackedLayout(prompts.mask.sum(1).tolist(), model.device)  # (M,)
    query_index = query_places(model.is_query(ids), model.num_queries)  # (E, N)
    rows = torch.arange(len(query_index), device=model.device)  # (E,)
    return model.read(layout, prompts.embeds[prompts.mask], patches, query_index, rows)


def decode(model: Octopus, prefill: Prefill, max_new_tokens: int) -> list[list[int]]:
    """Greedy tokens after a prefill of B prompts, without the final </s>. The device is read once per token."""
    out: list[list[int]] = [[] for _ in prefill.hidden]
    open_, hidden = set(range(len(out))), prefill.hidden  # (B, d)
    while open_:
        ids = model.logits(hidden, prefill).argmax(-1)  # (B, V + 2 + N) -> (B,)
        for row, token in enumerate(ids.tolist()):
            if row in open_ and token != model.tokenizer.eos_id:
                out[row].append(token)
            if token == model.tokenizer.eos_id or len(out[row]) == max_new_tokens:
                open_.discard(row)
        if open_:
            hidden = model.next_token(prefill, ids)  # (B, d)
    return out


def grounded(model: Octopus, prefill: Prefill, out: Sequence[list[int]]) -> list[GroundedAnswer]:
    """Tokens after a prefill -> answers."""
    if prefill.found is None:
        return [read_text(model.tokenizer.decode(ids)) for ids in out]
    boxes, scores = prefill.found.corners.tolist(), prefill.found.scores.tolist()
    answers = [
        read_indexed(ids, model.tokenizer, [tuple(box) for box in theirs], some)
        for ids, theirs, some in zip(out, boxes, scores, strict=True)
    ]
    if (masks := prefill.found.masks) is None:  # (B, N, H, W)
        return answers
    return [replace(a, masks=list(some[a.queries].half().cpu())) for a, some in zip(answers, masks, strict=True)]
