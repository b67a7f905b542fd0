"""Examples in the prompt: whose they are, and what counts as right."""

from pathlib import Path

import pytest
import torch

from fromage.errors import UserError
from fromage.evals import few_shot
from fromage.evals.dialogues import Dialogue, Round
from fromage.evals.few_shot import Shot, complete, evaluate, examples, question, read_world
from fromage.models.prompts import prompt_ids


def test_examples_are_others_and_more_of_them_are_longer_at_the_front():
    for number in range(6):
        most = examples(number, 5, 6)
        assert sorted(most) == [i for i in range(6) if i != number]
        assert all(examples(number, n, 6) == most[5 - n :] for n in range(6))


def test_prompts_hold_the_examples_answered_and_the_question_open(toy_model, monkeypatch):
    shots = [Shot(Path(f"{i}.png"), f"Q{i} A:", f" a{i}.", bool) for i in range(3)]
    features = torch.arange(3.0).unsqueeze(1).expand(-1, toy_model.vision.width)
    seen = []
    monkeypatch.setattr(few_shot, "generate", lambda model, prompts, decoding, batch_size: seen.extend(prompts) or [])
    complete(toy_model, shots, features, 1)
    other = examples(0, 1, 3)[0]
    assert seen[0][1:3] == [f"Q{other} A:", f" a{other}."] and seen[0][4:] == ["Q0 A:"]
    assert seen[0][0].equal(features[other]) and seen[0][3].equal(features[0])
    start, places = toy_model.tokenizer.start(), [toy_model.tokenizer.image_id] * toy_model.k
    words = [toy_model.tokenizer.encode(text) for text in (f"Q{other} A: a{other}.", "Q0 A:")]
    want = [*places, *start, *words[0], *places, *start, *words[1]]
    assert prompt_ids(toy_model, seen[0]) == want, "each pair as in training"
    with pytest.raises(UserError, match="0 to 2"):
        complete(toy_model, shots, features, 3)


def test_what_counts_as_right(tmp_path):
    talk = Dialogue(tmp_path, [Round("what?", "red", ["blue", "red", "it is red"], 1)], 0, [0.0, 1.0, 0.5])
    shot = question(talk)
    assert shot[:3] == (tmp_path, "Q: what? A:", " red.")
    assert [shot.accepts(text) for text in ("red", "it is red", "blue", "red it is")] == [True, True, False, False]


def test_shares_of_what_is_right(toy_model, world, monkeypatch):
    data = read_world(world, limit=4)
    report = evaluate(toy_model, data, shots=(0, 2))
    assert report["captions"] == report["questions"] == 4
    assert report["fromage"].keys() == {"captioning_0", "captioning_2", "questions_0", "questions_2"}
    assert all(0 <= figures["right"] <= 100 for figures in report["fromage"].values())
    monkeypatch.setattr(few_shot, "complete", lambda model, shots, *rest: [shot.text.strip().rstrip(".") for shot in shots])
    perfect = evaluate(toy_model, data, shots=(0,))["fromage"]
    assert perfect["questions_0"]["right"] == 100 and perfect["captioning_0"]["right"] == 100


def test_only_the_toy_world_will_do(tmp_path):
    with pytest.raises(UserError, match=r"captions_val2017\.json"):
        read_world(tmp_path)
