"""Answers that point at objects, as token ids and back: by index tokens, or with their boxes spelled as text.

By index token (Octopus) a box is one token, <d7> for what object query 7 found. Spelled (the sequential counterpart, as
Shikra does) it is [0.104,0.250,0.391,0.875]: left, top, right, bottom, three decimals each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from fromage.data.tokenizer import PromptTokenizer
from fromage.errors import UserError
from fromage.octopus.boxes import SPELLED, clipped, read_spelled, spelled
from fromage.octopus.examples import Box, Example


@dataclass(frozen=True)
class Grounded:
    """An answer.

    Attributes:
        text: as the model wrote it, index tokens or spelled boxes included.
        pieces: text, and in their places the boxes (left, top, right, bottom, shares of the image).
        candidates: every object query's box and score, the best first; none where boxes are spelled.
        queries: the numbers of the queries pointed at, in order; none where boxes are spelled.
    """

    text: str
    pieces: list[str | Box]
    candidates: list[tuple[Box, float]] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)

    @property
    def boxes(self) -> list[Box]:
        """The boxes pointed at, in order."""
        return [piece for piece in self.pieces if not isinstance(piece, str)]

    @property
    def pointed(self) -> list[tuple[Box, float | None]]:
        """The boxes pointed at with their scores, of which boxes that are spelled have none."""
        scores = dict(self.candidates)
        return [(box, scores.get(box)) for box in self.boxes]

    @property
    def words(self) -> str:
        """The text without what points."""
        return " ".join(" ".join(piece for piece in self.pieces if isinstance(piece, str)).split())


def ordered(example: Example) -> list[int]:
    """The numbers of an example's boxes, those meant first, in the answer's order."""
    return [*example.meant, *(i for i in range(len(example.boxes)) if i not in example.meant)]


def answer_ids(example: Example, tokenizer: PromptTokenizer, n: int) -> list[int]:
    """The tokens of an example's answer, </s> behind. The i-th object meant, of those of `ordered`, is <di>: which query
    that becomes is known when queries and objects are matched. Without queries (n = 0) boxes are spelled.

    Raises UserError where more objects are meant than there are queries.
    """
    if n and len(example.meant) > n:
        raise UserError(f"{example.key}: points at {len(example.meant)} boxes, more than {n} object queries; raise model.n")
    place = {number: i for i, number in enumerate(example.meant)}
    ids: list[int] = []
    for piece in example.answer:
        if isinstance(piece, str):
            ids += tokenizer.encode(piece)
        elif n:
            ids.append(tokenizer.row_ids[place[piece]])
        else:
            ids += tokenizer.encode(spelled(example.boxes[piece]))
    return [*ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]


def read_text(text: str) -> Grounded:
    """An answer whose boxes are spelled. What is no box, or one without area, stays text."""
    pieces: list[str | Box] = []
    end = 0
    for found in SPELLED.finditer(text):
        boxes = [clipped(*sides) for sides in read_spelled(found[0])]
        if None not in boxes:
            pieces += [text[end : found.start()], *(box for box in boxes if box)]
            end = found.end()
    return Grounded(text, [piece for piece in [*pieces, text[end:]] if piece != ""])


def read_indexed(ids: Sequence[int], tokenizer: PromptTokenizer, boxes: Sequence[Box], scores: Sequence[float]) -> Grounded:
    """An answer whose index tokens name queries, of which boxes and scores are given.

    Raises UserError for a query that is not among them.
    """
    pieces: list[str | Box] = []
    text, queries = "", []
    first = tokenizer.row_ids[0] if tokenizer.row_ids else tokenizer.vocab_size
    for pointing, some in groupby(ids, lambda token: token >= first):
        if not pointing:
            words = tokenizer.decode(list(some))
            text, pieces = text + words, [*pieces, *([words] if words else [])]
            continue
        for query in (token - first for token in some):
            if query >= len(boxes):
                raise UserError(f"the answer names <d{query}>, but only {len(boxes)} objects were looked for; raise model.n")
            text, pieces = text + f"<d{query}>", [*pieces, boxes[query]]
            queries.append(query)
    ranked = sorted(zip(boxes, scores, strict=True), key=lambda candidate: -candidate[1])
    return Grounded(text, pieces, ranked, queries)
