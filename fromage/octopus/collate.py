"""Rows of conversations -> a batch: prompts and answers as tokens, known objects, pixels or stored patches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert

from fromage.data.padding import pad
from fromage.data.tokenizer import PromptTokenizer
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
        tokenizer, num_queries = self.layout.tokenizer, self.layout.num_queries
        laid = [self._lay(row) for row, _ in rows]
        prompts = _rows([one.prompts for one in laid])
        answers, kept = pad([answer for one in laid for answer in one.answers], tokenizer.pad_id)  # (E, A)
        queries = query_places(prompts.ids == tokenizer.added[QUERY], num_queries)  # (E, N)
        A, turns_before, before, fed_before = answers.shape[1], 0, 0, len(prompts.ids)
        fed, at = [], []
        for one in laid:
            at += [(fed_before if after else before) + place for each in one.at for after, place in each]
            fed.append(one.fed._replace(ids=[(turns_before + turn) * A + place for turn, place in one.fed_from]))
            turns_before, before = turns_before + len(one.answers), before + len(one.prompts.ids)
            fed_before += len(one.fed_from)
        shown = torch.stack([tensor for _, tensor in rows])
        examples = [turn for row, _ in rows for turns in row for turn in turns]
        return GroundingBatch(
            examples=examples,
            prompts=prompts,
            answers=answers,
            targets=kept.flatten().nonzero().flatten(),
            fed=_rows(fed),
            at=torch.tensor(at, dtype=torch.long),
            queries=queries,
            images=torch.tensor([number for number, one in enumerate(laid) for _ in one.answers])[: len(queries)],
            objects=objects_of(examples, num_queries, self.layout.mask_size),
            pixels=None if self.stored else shown,
            patches=shown if self.stored else None,
        )

    def _lay(self, row: Row) -> _Laid:
        """The tokens of a row: the shared part, then each conversation as a branch."""
        laid = _Laid(_Row([], [], []), _Row([], [], []), [], [], [], {})
        for number, turns in enumerate(row, 1):
            for turn in turns:
                answer = answer_ids(turn, self.layout.tokenizer, self.layout.num_queries)
                prompt, cut = self._prompt(turn, first=turn is turns[0]), 0
                if turn is turns[0]:
                    cut = len(prompt) - prompt[::-1].index(self.layout.tokenizer.image_id)  # after the image
                if not laid.prompts.ids:
                    laid.add(laid.prompts, prompt[:cut], 0)
                laid.add(laid.prompts, prompt[cut:], number)
                at, turn_number = [(False, len(laid.prompts.ids) - 1)], len(laid.answers)
                if last := turn is turns[-1]:
                    laid.fed_from.extend((turn_number, place) for place in range(len(answer) - 1))
                rows = laid.fed if last else laid.prompts
                at += [(last, len(rows.ids) + place) for place in range(len(answer) - 1)]
                laid.add(rows, answer[:-1] if last else answer, number)
                laid.answers.append(answer)
                laid.at.append(at)
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


class _Row(NamedTuple):
    """The tokens of one row, as of Rows."""

    ids: list[int]
    positions: list[int]
    branch: list[int]


class _Laid(NamedTuple):
    """One row, laid out."""

    prompts: _Row
    fed: _Row  # the tokens after the prompts
    answers: list[list[int]]  # of each turn
    at: list[list[tuple[bool, int]]]  # where each token of an answer is predicted: after the prompts or in them; the place
    fed_from: list[tuple[int, int]]  # the turn and the place in its answer of each token after the prompts
    ends: dict[int, int]  # the next position of each branch

    def add(self, to: _Row, ids: list[int], branch: int) -> None:
        """More tokens of a branch, which begins after the shared part."""
        first = self.ends.get(branch, self.ends.get(0, 0))
        self.ends[branch] = first + len(ids)
        to.ids.extend(ids)
        to.positions.extend(range(first, first + len(ids)))
        to.branch.extend([branch] * len(ids))


def _rows(rows: Sequence[_Row]) -> Rows:
    """Rows laid end to end."""
    ids, positions, branch = (
        torch.tensor([*chain.from_iterable(each)], dtype=torch.long) for each in zip(*rows, strict=True)
    )
    return Rows(ids, [len(row.ids) for row in rows], positions, branch)


def objects_of(examples: Sequence[Example], num_queries: int, mask_size: tuple[int, int] | None = None) -> Objects:
    """The objects that the answers point at, at most num_queries per image; their masks too where a size (H, W) is given."""
    rows = [[example.boxes[i] for i in example.meant][:num_queries] for example in examples]
    boxes = torch.zeros(len(rows), max(map(len, rows)), 4)  # (B, K, 4)
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
