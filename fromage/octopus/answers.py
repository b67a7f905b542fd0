"""Answers that point at objects, from and to token ids: with index tokens, or with boxes spelled as text.

As an index token (Octopus) a box is one token: <d7> is the box of object query 7. Spelled (sequential counterpart, as in
Shikra) it is [0.104,0.250,0.391,0.875]: left, top, right, bottom, three decimals each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from torch import Tensor

from fromage.data.tokenizer import PromptTokenizer
from fromage.errors import UserError
from fromage.octopus.boxes import SPELLED, clipped, read_spelled, spelled
from fromage.octopus.examples import Box, Example


@dataclass(frozen=True)
class GroundedAnswer:
    """An answer.

    Attributes:
        text: the answer as the model wrote it, with index tokens or spelled boxes.
        pieces: text and boxes in order; a box is left, top, right, bottom, relative to the image (0 to 1).
        candidates: box and score of every object query, best first; empty if boxes are spelled.
        queries: the numbers of the queries pointed at, in order, and
        scores: their scores; both empty if boxes are spelled.
        masks: (H, W) logits of the mask of each box pointed at, on the host (fromage.octopus.masks.at_size enlarges them);
            empty where the model has none.
    """

    text: str
    pieces: list[str | Box]
    candidates: list[tuple[Box, float]] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list, compare=False)

    @property
    def boxes(self) -> list[Box]:
        """The boxes pointed at, in order."""
        return [piece for piece in self.pieces if not isinstance(piece, str)]

    @property
    def pointed(self) -> list[tuple[Box, float | None]]:
        """The boxes pointed at with their scores; a spelled box has None."""
        boxes = self.boxes
        scores: Sequence[float | None] = self.scores or [None] * len(boxes)
        return list(zip(boxes, scores, strict=True))

    @property
    def words(self) -> str:
        """The text without index tokens and boxes."""
        return " ".join(" ".join(piece for piece in self.pieces if isinstance(piece, str)).split())


def answer_ids(example: Example, tokenizer: PromptTokenizer, num_queries: int) -> list[int]:
    """The tokens of an example's answer, with </s> at the end.

    The i-th object that the answer points at is <di>; the training step replaces i by the number of its query. Without
    queries (num_queries = 0) boxes are spelled. Raises UserError for an answer that points at more objects.
    """
    if num_queries and len(example.meant) > num_queries:
        many = f"points at {len(example.meant)} boxes, more than {num_queries} object queries"
        raise UserError(f"{example.key}: {many}; raise model.num_queries")
    place = {number: i for i, number in enumerate(example.meant)}
    ids: list[int] = []
    for piece in example.answer:
        if isinstance(piece, str):
            ids += tokenizer.encode(piece)
        elif num_queries:
            ids.append(tokenizer.trained_ids[place[piece]])
        else:
            ids += tokenizer.encode(spelled(example.boxes[piece]))
    return [*ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]


def read_text(text: str) -> GroundedAnswer:
    """Read an answer with spelled boxes. Boxes without area, and anything else in brackets, stay text."""
    pieces: list[str | Box] = []
    end = 0
    for found in SPELLED.finditer(text):
        boxes = [clipped(*sides) for sides in read_spelled(found[0])]
        if None not in boxes:
            pieces += [text[end : found.start()], *(box for box in boxes if box)]
            end = found.end()
    return GroundedAnswer(text, [piece for piece in [*pieces, text[end:]] if piece != ""])


def read_indexed(
    ids: Sequence[int], tokenizer: PromptTokenizer, boxes: Sequence[Box], scores: Sequence[float]
) -> GroundedAnswer:
    """Read an answer with index tokens, given the boxes and scores of all queries.

    Raises UserError for an index token without a query.
    """
    pieces: list[str | Box] = []
    text, queries = "", []
    first = tokenizer.trained_ids[0] if tokenizer.trained_ids else tokenizer.vocab_size
    for pointing, some in groupby(ids, lambda token: token >= first):
        if not pointing:
            words = tokenizer.decode(list(some))
            text, pieces = text + words, [*pieces, *([words] if words else [])]
            continue
        for query in (token - first for token in some):
            if query >= len(boxes):
                raise UserError(
                    f"the answer names <d{query}>, but only {len(boxes)} objects were looked for; raise model.num_queries"
                )
            text, pieces = text + f"<d{query}>", [*pieces, boxes[query]]
            queries.append(query)
    ranked = sorted(zip(boxes, scores, strict=True), key=lambda candidate: -candidate[1])
    return GroundedAnswer(text, pieces, ranked, queries, [scores[query] for query in queries])
