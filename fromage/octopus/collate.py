"""Rows of conversations -> a batch: prompts and answers as tokens, known objects, pixels or stored patches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert

from fromage.data.tokenizer import PromptTokenizer
from fromage.models.packed_layout import offsets
from fromage.models.prompts import part_ids
from fromage.octopus.answers import answer_ids
from fromage.octopus.branches import Rows, query_places
from fromage.octopus.examples import Conversation, Example, Row
from fromage.octopus.matching import Objects
from fromage.octopus.model import Octopus
from fromage.octopus.queries import QUERY, query_tokens
from fromage.octopus.step import GroundingBatch
from fromage.octopus.template import fill_further_turn, fill_template

LONGEST_BOX = len("[0.000,0.000,0.000,0.000]")


class GroundingLayout(NamedTuple):
    """The parts of a model that determine the tokens of its prompts; worker processes get these only."""

    tokenizer: PromptTokenizer
    k: int
    num_queries: int
    template: list[str]
    mask_size: tuple[int, int] | None


class Collate:
    """Rows -> a batch."""

    def __init__(self, model: Octopus, stored: bool, ask: bool) -> None:
        # a worker need not carry the model
        self.layout = GroundingLayout(model.tokenizer, model.k, model.num_queries, model.template, model.mask_size)
        self.stored, self.ask = stored, ask

    def __call__(self, rows: list[tuple[Row, Tensor]]) -> GroundingBatch:
        """Conversations with the pixels (3, H, W) or patches (P, m) of their image -> a batch."""
        num_queries, laid, said = self.layout.num_queries, list[_LaidRow](), 0
        for row, _ in rows:
            laid.append(self._lay(row, said))
            said += sum(map(len, laid[-1].answers))
        prompts, fed = _rows([row.prompts for row in laid]), _rows([row.fed for row in laid])
        answers = [answer for row in laid for answer in row.answers]  # E of them
        first = zip(laid, offsets(prompts.lengths), offsets(fed.lengths), strict=True)
        at = [len(prompts.ids) + f + place if is_fed else p + place for row, p, f in first for is_fed, place in row.at]
        query_index = query_places(prompts.ids == self.layout.tokenizer.added[QUERY], num_queries)  # (E, N)
        shown = torch.stack([tensor for _, tensor in rows])
        examples = [turn for row, _ in rows for turns in row for turn in turns]
        return GroundingBatch(
            examples=examples,
            prompts=prompts,
            answers=_long(token for answer in answers for token in answer),
            owners=_long(number for number, answer in enumerate(answers) for _ in answer),
            at=_long(at),
            fed=fed,
            query_index=query_index,
            row_of_prompt=_long(number for number, row in enumerate(laid) for _ in row.answers)[: len(query_index)],
            objects=objects_of(examples, num_queries, self.layout.mask_size),
            pixels=None if self.stored else shown,
            patches=shown if self.stored else None,
        )

    def _lay(self, row: Row, said: int = 0) -> _LaidRow:
        """The tokens of a row: the shared part, then each conversation as a branch. said: answer tokens before it."""
        laid = _LaidRow(_RowTokens([], [], []), _RowTokens([], [], []), [], [], {})
        for branch, turns in enumerate(row, 1):
            for turn in turns:
                answer = answer_ids(turn, self.layout.tokenizer, self.layout.num_queries)
                prompt, shared = self._prompt(turn, first=turn is turns[0]), 0
                if turn is turns[0]:
                    shared = len(prompt) - prompt[::-1].index(self.layout.tokenizer.image_id)  # up to the image
                if not laid.prompts.ids:
                    laid.add(laid.prompts, prompt[:shared], 0)
                laid.add(laid.prompts, prompt[shared:], branch)
                laid.at.append((False, len(laid.prompts.ids) - 1))  # the prompt's last token predicts the answer's first
                last = turn is turns[-1]
                tokens, ids = (laid.fed, [*range(said, said + len(answer))]) if last else (laid.prompts, answer)
                laid.at.extend((last, len(tokens.ids) + place) for place in range(len(answer) - 1))
                laid.add(tokens, ids[:-1] if last else ids, branch)
                laid.answers.append(answer)
                said += len(answer)
        return laid

    def _prompt(self, example: Example, first: bool) -> list[int]:
        """first: of its conversation; the image stands there alone."""
        template, queries = self.layout.template, query_tokens(self.layout.tokenizer, self.layout.num_queries * self.ask)
        if first:
            image = torch.empty(0)  # any tensor: only the number of its tokens matters
            parts = fill_template(template, image, example.instruction, queries)
        else:
            parts = fill_further_turn(template, example.instruction, queries)
        return list(chain.from_iterable(part_ids(self.layout, part) for part in parts))

    def fitting(self, turns: Conversation, longest: int) -> Conversation:
        """As many first turns of a conversation as have at most `longest` tokens, image included."""
        spelled = 0 if self.layout.num_queries else LONGEST_BOX
        for count in range(len(turns), 0, -1):
            some = turns[:count]
            fixed = self.layout.k + count * (self.layout.num_queries + len("".join(self.layout.template).encode()) + 8)
            if fixed + sum(_most_tokens(turn, spelled) for turn in some) <= longest:
                return some
            laid = self._lay([some])
            if len(laid.prompts.ids) + len(laid.fed.ids) <= longest:
                return some
        return []


def _most_tokens(turn: Example, box: int) -> int:
    """A bound on the tokens of a question and its answer: each is at least a byte, and each text may begin with one more.

    box: bytes of a box that is spelled; 0 where it is one token.
    """
    pieces = [len(piece.encode()) + 1 if isinstance(piece, str) else max(1, box) for piece in turn.answer]
    return len(turn.instruction.encode()) + sum(pieces)


class _RowTokens(NamedTuple):
    """The tokens of one row, as of Rows."""

    ids: list[int]
    positions: list[int]
    branch: list[int]


class _LaidRow(NamedTuple):
    """One row, laid out; its fields are those of GroundingBatch."""

    prompts: _RowTokens
    fed: _RowTokens
    answers: list[list[int]]  # of each turn
    at: list[tuple[bool, int]]  # where each token of the answers is predicted: whether in fed, else in prompts; the place
    ends: dict[int, int]  # the next position of each branch

    def add(self, to: _RowTokens, ids: list[int], branch: int) -> None:
        """More tokens of a branch, which begins after the shared part."""
        first = self.ends.get(branch, self.ends.get(0, 0))
        self.ends[branch] = first + len(ids)
        to.ids.extend(ids)
        to.positions.extend(range(first, first + len(ids)))
        to.branch.extend([branch] * len(ids))


def _rows(rows: Sequence[_RowTokens]) -> Rows:
    """Rows laid end to end."""
    ids, positions, branch = (_long(chain.from_iterable(each)) for each in zip(*rows, strict=True))
    return Rows(ids, [len(row.ids) for row in rows], positions, branch)


def _long(values: Iterable[int]) -> Tensor:
    return torch.tensor([*values], dtype=torch.long)


def objects_of(examples: Sequence[Example], num_queries: int, mask_size: tuple[int, int] | None = None) -> Objects:
    """The objects that the answers point at, at most num_queries per example; with a size (H, W) their masks too."""
    rows = [[example.boxes[i] for i in example.meant][:num_queries] for example in examples]
    boxes = torch.zeros(len(rows), max(map(len, rows)), 4)  # (E, K, 4)
    for row, theirs in zip(boxes, rows, strict=True):
        if theirs:
            row[: len(theirs)] = box_convert(torch.tensor(theirs), "xyxy", "cxcywh")
    counts = [len(row) for row in rows]
    if mask_size is None:
        return Objects(boxes, counts)
    known = [(row, place) for row, one in enumerate(examples) for place, mask in enumerate(one.masks[: counts[row]]) if mask]
    masks = torch.zeros(len(known), *mask_size)  # (M, H, W)
    for cells, (row, place) in zip(masks, known, strict=True):
        cells.copy_(examples[row].masks[place].coverage(mask_size))  # type: ignore[union-attr]
    return Objects(boxes, counts, masks, torch.tensor(known, dtype=torch.long).view(-1, 2).T)
