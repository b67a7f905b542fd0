"""Examples in the prompt: whose they are, and what counts as right."""

import pytest
import torch

from fromage.errors import UserError
from fromage.evals import few_shot
from fromage.evals.dialogues import Dialogue, Round
from fromage.evals.few_shot import Shot, accepted, complete, evaluate, examples, question
from fromage.models.prompts import START


def test_examples_are_others_and_more_of_them_are_longer_at_the_front():
    for number in range(6):
        most = examples(number, 5, 6)
        assert sorted(most) == [i for i in range(6) if i != number]
        assert all(examples(number, n, 6) == most[5 - n :] for n in range(6))


def test_prompts_hold_the_examples_answered_and_the_question_open(toy_model, monkeypatch):
    shots = [Shot(torch.full((toy_model.vision.width,), float(i)), f"Q{i} A:", f" a{i}.") for i in range(3)]
    seen = []
    monkeypatch.setattr(few_shot, "generate", lambda model, prompts, decoding: seen.extend(prompts) or [])
    complete(toy_model, shots, 1)
    other = examples(0, 1, 3)[0]
    assert seen[0][1:4] == [START, f"Q{other} A:", f" a{other}."] and seen[0][5:] == [START, "Q0 A:"]
    assert seen[0][0] is shots[other].features and seen[0][4] is shots[0].features
    with pytest.raises(UserError, match="0 to 2"):
        complete(toy_model, shots, 3)


def test_what_counts_as_right(tmp_path):
    talk = Dialogue(tmp_path, [Round("what?", "red", ["blue", "red", "it is red"], 1)], 0, [0.0, 1.0, 0.5])
    assert accepted(talk) == {"red", "it is red"}
    assert question(talk, torch.zeros(3))[1:] == ("Q: what? A:", " red.")


def test_shares_of_what_is_right(toy_model, world, monkeypatch):
    report = evaluate(toy_model, world, shots=(0, 2), limit=4)
    assert report["captions"] == report["questions"] == 4
    assert report["fromage"].keys() == {"captioning_0", "captioning_2", "questions_0", "questions_2"}
    assert all(0 <= figures["right"] <= 100 for figures in report["fromage"].values())
    monkeypatch.setattr(few_shot, "complete", lambda model, shots, n: [shot.said.strip().rstrip(".") for shot in shots])
    perfect = evaluate(toy_model, world, shots=(0,), limit=4)["fromage"]
    assert perfect["questions_0"]["right"] == 100 and perfect["captioning_0"]["right"] == 100


def test_only_the_toy_world_will_do(toy_model, tmp_path):
    with pytest.raises(UserError, match=r"captions_val2017\.json"):
        evaluate(toy_model, tmp_path)
