"""Dialogues about images as VisDial 1.0 publishes them, with a hundred candidates for every answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fromage.data.annotation_formats import read_annotations
from fromage.data.annotations import NUMBER, TEXT, WHOLE, Schema, below, fitting, problem
from fromage.errors import UserError

CANDIDATES = "dialogues of VisDial 1.0 with candidates", "visdial_1.0_val.json"
DENSE = "dense annotations of VisDial 1.0", "visdial_1.0_val_dense_annotations.json"


@dataclass(frozen=True)
class Round:
    """A question, its answer, and the candidates; candidates[right] is the answer."""

    question: str
    answer: str
    candidates: list[str]
    right: int


@dataclass(frozen=True)
class Dialogue:
    """Rounds about an image.

    Attributes:
        rated: the round, from 0, whose candidates people rated.
        relevance: of each of these candidates, 0 to 1.
    """

    image: Path
    rounds: list[Round]
    rated: int
    relevance: list[float]


@dataclass(frozen=True)
class Dialogues:
    """The dialogues of a file, all of equally many rounds and candidates."""

    name: str
    dialogues: list[Dialogue]


def read_dialogues(annotations: Path, dense: Path, images: Path, limit: int | None = None) -> Dialogues:
    """VisDial's validation dialogues, with images/VisualDialog_val2018_000000123456.jpg and on.

    Args:
        annotations: visdial_1.0_val.json.
        dense: visdial_1.0_val_dense_annotations.json, the ratings; in it rounds count from 1.
        images: folder of the images.
        limit: dialogues at most; None for all.

    Raises UserError for files that are missing, broken, of another kind or version, or of different dialogues.
    """
    _, content = read_annotations(annotations, (CANDIDATES[0],), CANDIDATES[1])
    rated = _ratings(dense)
    data = content["data"]
    for name in ("questions", "answers"):
        if odd := problem(data.get(name), [TEXT]):
            raise UserError(f"{annotations}: data.{name}{odd}; fetch the file again")
    questions, answers = below(len(data["questions"])), below(len(data["answers"]))
    turn: Schema = {"question": questions, "answer": answers, "answer_options": [answers], "gt_index": WHOLE}
    listed = fitting(annotations, "data.dialogs", data["dialogs"], {"image_id": WHOLE, "dialog": [turn]})[:limit]
    if odd := problem(content.get("split"), TEXT):
        raise UserError(f"{annotations}: split{odd}; fetch the file again")
    if lacking := [dialogue["image_id"] for dialogue in listed if dialogue["image_id"] not in rated]:
        raise UserError(
            f"{dense}: has no ratings for {len(lacking)} of the dialogues ({lacking[:3]}); take both of one split"
        )
    name = f"VisualDialog_{content['split']}2018_"
    dialogues = [
        Dialogue(images / f"{name}{dialogue['image_id']:012d}.jpg", _rounds(dialogue, data), *rated[dialogue["image_id"]])
        for dialogue in listed
    ]
    _check(annotations, dialogues)
    for dialogue in dialogues:
        if not 0 <= dialogue.rated < len(dialogue.rounds) or len(dialogue.relevance) != len(
            dialogue.rounds[dialogue.rated].candidates
        ):
            raise UserError(
                f"{dense}: the ratings of {dialogue.image.name} are not of its candidates; take both of one split"
            )
    return Dialogues(annotations.name, dialogues)


def _ratings(dense: Path) -> dict[int, tuple[int, list[float]]]:
    """Image -> the round that was rated, from 0, and the relevance of its candidates."""
    _, ratings = read_annotations(dense, (DENSE[0],), DENSE[1])
    notes = fitting(dense, "ratings", ratings, {"image_id": WHOLE, "round_id": WHOLE, "gt_relevance": [NUMBER]})
    return {note["image_id"]: (note["round_id"] - 1, list(map(float, note["gt_relevance"]))) for note in notes}


def _rounds(dialogue: dict[str, Any], data: dict[str, list[str]]) -> list[Round]:
    questions, answers = data["questions"], data["answers"]
    return [
        Round(
            questions[turn["question"]] + "?",
            answers[turn["answer"]],
            [answers[i] for i in turn["answer_options"]],
            turn["gt_index"],
        )
        for turn in dialogue["dialog"]
    ]


def _check(path: Path, dialogues: list[Dialogue]) -> None:
    """Raise UserError for dialogues of unequal shape, and for right answers that belong to others."""
    shapes = {(len(dialogue.rounds), len(turn.candidates)) for dialogue in dialogues for turn in dialogue.rounds}
    if len(shapes) != 1:
        raise UserError(f"{path}: rounds and candidates vary: {sorted(shapes)[:3]}; fetch the file again")
    for dialogue in dialogues:
        if any(turn.answer not in turn.candidates[turn.right :][:1] for turn in dialogue.rounds):
            raise UserError(f"{path}: gt_index of {dialogue.image.name} names another answer; fetch the file again")


def spoken(rounds: Sequence[Round]) -> str:
    """Rounds on one line: 'Q: ...? A: ... .'"""
    return " ".join(f"Q: {turn.question} A: {turn.answer}." for turn in rounds)
