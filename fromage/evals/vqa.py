"""VQA accuracy: an answer's agreement with those that ten people gave (Antol et al., ICCV 2015; VQAv2 and OK-VQA).

    accuracy = mean over the ten of min(1, how many of the other nine said the same / 3)

so that 1, 2, 3 and 4 people who said the same make 0.3, 0.6, 0.9 and 1. Answers are compared after the normalisation of the
official evaluation (github.com/GT-Vision-Lab/VQA, vqaEval.py): those of people where they differ, as there, and the model's
always, for so they are commonly handed in. So of ten people who all say "t-shirt" none has said the model's "t shirt": it
counts as wrong. LLaVA's scripts take one step more before they hand in, which sets off "'s" as a word; it is not taken here.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fromage.data.annotations import FILE as FILE_NAME
from fromage.data.annotations import ID, TEXT, Schema, fitting, optional
from fromage.errors import UserError
from fromage.io import read_json

ENOUGH = 3  # of the others, who said the same
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
SPELLED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {word.replace("'", ""): word for word in SPELLED.split()}  # without apostrophes -> as it is written
SAID: dict[str, Schema] = {"answers": [{"answer": TEXT}], "answer_type": optional(TEXT)}
FILE = "v2_mscoco_val2014_annotations.json, VizWiz's val.json, or another of these forms"


class HumanAnswers(NamedTuple):
    """What people answered, and the kind of answer (yes/no, number, other, unanswerable); '' where the file does not say."""

    answers: list[str]
    kind: str


def read_vqa(path: Path) -> dict[int | str, HumanAnswers]:
    """What people answered, by question_id (VQAv2: {annotations: [...]}) or by the name of the image (VizWiz: a list).

    Raises UserError for a file of another format.
    """
    content = read_json(path, FILE)
    if isinstance(content, list) and content:
        key, notes = "image", fitting(path, "annotations", content, SAID | {"image": FILE_NAME})
    elif isinstance(content, dict) and "annotations" in content:
        key, notes = "question_id", fitting(path, "annotations", content["annotations"], SAID | {"question_id": ID})
    else:
        raise UserError(f"{path}: has no annotations; name {FILE}")
    few = sum(len(note["answers"]) <= ENOUGH for note in notes)
    if few:
        told = f"{few} of {len(notes)} questions have at most {ENOUGH} answers, of which none can reach an accuracy of 1"
        warnings.warn(f"{path}: {told}; VQA accuracy is meant for ten answers", stacklevel=2)
    return {
        note[key]: HumanAnswers([each["answer"] for each in note["answers"]], note.get("answer_type") or "")
        for note in notes
        if note["answers"]
    }


def accuracy(answer: str, said: Sequence[str]) -> float:
    """VQA accuracy, 0 to 1, of an answer against those of N people."""
    own = normalised(answer)
    plain = [_plain(each) for each in said]
    theirs = [normalised(each) for each in plain] if len(set(plain)) > 1 else plain
    same = theirs.count(own)
    return sum(min(1.0, (same - (each == own)) / ENOUGH) for each in theirs) / len(theirs)


def normalised(text: str) -> str:
    """An answer without case, articles and punctuation, its numbers in digits and its contractions with apostrophes.

    Punctuation beside a space goes, also where digits have a comma between them; elsewhere it becomes a space.
    """
    text = _plain(text)
    thousands, bare = re.search(r"\d,+\d", text), text
    for mark in PUNCTUATION:
        goes = thousands or f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if goes else " ")
    words = re.sub(r"\.(?!\d)", "", bare).lower().split()
    kept = [word for word in (NUMBERS.get(word, word) for word in words) if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word.replace("'", ""), word) for word in kept)


def _plain(text: str) -> str:
    """On one line, without white space around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()
