"""Dialogues: ranked answers in both protocols, scores that outlive a kill, images by rounds."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from fromage.errors import UserError
from fromage.evals import contextual, visdial
from fromage.evals.dialogues import Dialogue, Dialogues, Round, read_dialogues
from fromage.evals.options import Options
from fromage.evals.visdial import (
    ANSWER_PROTOCOLS,
    answer_figures,
    authors_prompt,
    chance_figures,
    evaluate,
    image_tasks,
    our_prompt,
    score_answers,
)
from fromage.models.encode_files import encode_files
from fromage.models.prompts import embed_prompts
from fromage.retrieval.metrics import places, recall_at


@pytest.fixture
def data(world):
    """Two dialogues, of two rounds and seven candidates each."""
    folder = world / "visdial"
    dense = folder / "visdial_1.0_val_dense_annotations.json"
    whole = read_dialogues(folder / "visdial_1.0_val.json", dense, folder / "images" / "val", limit=2)
    talks = []
    for number, talk in enumerate(whole.dialogues):
        rounds = [Round(r.question, r.answer, [r.answer, *[c for c in r.candidates if c != r.answer][:6]], 0)
                  for r in talk.rounds[:2]]  # fmt: skip
        talks.append(Dialogue(talk.image, rounds, number, [1.0, 0.0, 0.5, 0, 0, 0, 0]))
    return Dialogues("two", talks)


def features_of(model, data):
    return encode_files(model, [talk.image for talk in data.dialogues], Options(), ("own", "square")).views


@torch.no_grad()
def whole_pass(model, parts, text, unshifted):
    batch = embed_prompts(model, [parts])
    ids = torch.tensor([model.tokenizer.encode(text)])
    embeds = torch.cat([batch.embeds, model.embed(ids)], 1)
    logits = model.lm.logits(model.lm(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool)))[0].log_softmax(-1)
    first = batch.ids.shape[1] - (not unshifted)
    return sum(float(logits[first + i, token]) for i, token in enumerate(ids[0]))


def test_scores_are_those_of_whole_passes_in_the_words_of_each_protocol(toy_model, data):
    features = features_of(toy_model, data)
    scores, talk = score_answers(toy_model, data.dialogues, features), data.dialogues[1]
    assert {name: tuple(s.shape) for name, s in scores.items()} == dict.fromkeys(ANSWER_PROTOCOLS, (2, 2, 7))
    said = talk.rounds
    corrected, theirs = our_prompt(talk, 1, features["own"][1]), authors_prompt(talk, 1, features["square"][1])
    assert corrected[2] == f"Q: {said[0].question} A: {said[0].answer}. Q: {said[1].question} A:"
    assert theirs[2] == f"Q: {said[0].question}\nA: {said[0].answer}\nQ: {said[1].question}\nA: "
    assert our_prompt(talk, 0, features["own"][1])[2] == f"Q: {said[0].question} A:"
    for c, text in enumerate(said[1].candidates):
        assert float(scores["answers"][1, 1, c]) == pytest.approx(
            whole_pass(toy_model, corrected, f" {text}.", False), abs=1e-3
        )
        assert float(scores["answers_authors"][1, 1, c]) == pytest.approx(
            whole_pass(toy_model, theirs, text, True), abs=1e-3
        )


def test_a_run_that_was_killed_goes_on_and_gives_the_same(toy_model, data, tmp_path, monkeypatch):
    features, folder = features_of(toy_model, data), tmp_path / "scores"
    want = score_answers(toy_model, data.dialogues, features)
    ranked, plain = [], visdial.dialogue_scores

    def dies_at_the_second(*args):
        if len(ranked) == 1:
            raise KeyboardInterrupt
        ranked.append(args)
        return plain(*args)

    monkeypatch.setattr(visdial, "dialogue_scores", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        score_answers(toy_model, data.dialogues, features, folder)
    (folder / ".000001.part").write_bytes(b"half a fi")
    ranked.clear()
    monkeypatch.setattr(visdial, "dialogue_scores", lambda *args: ranked.append(args) or plain(*args))
    got = score_answers(toy_model, data.dialogues, features, folder)
    assert len(ranked) == 1, "the first dialogue was there"
    for name in ANSWER_PROTOCOLS:
        torch.testing.assert_close(got[name], want[name])
    score_answers(toy_model, data.dialogues, features, folder)
    assert len(ranked) == 1
    for name in ("000001.npy", "about.json"):
        (folder / name).write_bytes(b"torn")
        with pytest.raises(UserError, match=rf"{name}: .*remove it"):
            score_answers(toy_model, data.dialogues, features, folder)


def test_scores_of_another_model_or_of_other_dialogues_are_refused(toy_model, data, tmp_path, monkeypatch):
    features, folder = features_of(toy_model, data), tmp_path / "scores"
    score_answers(toy_model, data.dialogues[:1], features, folder)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be a folder, since a file is in the way"):
        score_answers(toy_model, data.dialogues, features, tmp_path / "file")
    with pytest.raises(UserError, match="name another --scores"):
        score_answers(toy_model, data.dialogues, features, folder)
    elsewhere = [replace(talk, image=tmp_path / talk.image.name) for talk in data.dialogues[:1]]
    with pytest.raises(UserError, match=r"another checkpoint.*\(images "):
        score_answers(toy_model, elsewhere, features, folder)
    with monkeypatch.context() as patch:
        patch.setattr("fromage.evals.base.digest_of_samples", lambda lm: "another")
        with pytest.raises(UserError, match=r"another checkpoint.*\(language_model "):
            score_answers(toy_model, data.dialogues[:1], features, folder)
    with torch.no_grad():
        toy_model.logit_scale += 1
    with pytest.raises(UserError, match="another checkpoint"):
        score_answers(toy_model, data.dialogues[:1], features, folder)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "one.txt").touch()
    with pytest.raises(UserError, match="something else"):
        score_answers(toy_model, data.dialogues, features, tmp_path / "thesis")


def test_figures_by_hand(data):
    """Right answers at ranks 1, 3, 7 (a tie of all) and 2; rated are round 0 of the first and round 1 of the second."""
    rows = [[9, 1, 2, 3, 4, 5, 6], [5, 9, 8, 1, 2, 3, 4], [0] * 7, [8, 9, 1, 2, 3, 4, 5]]
    scores = torch.tensor(rows).float().view(2, 2, 7)
    figures, d = answer_figures(scores, data.dialogues), [1 / math.log2(i) for i in (2, 3)]
    assert figures["mrr"] == pytest.approx(100 * (1 + 1 / 3 + 1 / 7 + 1 / 2) / 4)
    assert figures["mean_rank"] == 13 / 4 and (figures["r1"], figures["r5"], figures["r10"]) == (25, 75, 100)
    best = d[0] + 0.5 * d[1]
    assert figures["ndcg"] == pytest.approx(100 * (d[0] / best + d[1] / best) / 2, rel=1e-5)
    authors = answer_figures(scores, data.dialogues, rated_offset=1)  # round 1 of the first; the second's is past the end
    assert authors["ndcg"] == pytest.approx(100 * 0.5 * d[1] / best, rel=1e-5) and authors["mrr"] == figures["mrr"]


def test_chance_is_the_mean_of_random_scores(data):
    generator = torch.Generator().manual_seed(0)
    many = [answer_figures(torch.rand(2, 2, 7, generator=generator), data.dialogues) for _ in range(1500)]
    for name, value in chance_figures(data.dialogues).items():
        assert sum(figures[name] for figures in many) / len(many) == pytest.approx(value, rel=0.06), name


def test_the_curve_both_ways(data):
    """Three images; the queries of one round all say the first, those of two rounds find their own."""
    images, same = torch.eye(3), torch.eye(3)[[0, 0, 0]]

    def r1(squares):
        rows = {"0 rounds": same, "1 rounds": same, "2 rounds": images, "own": images, "square": squares}
        of = lambda side: rows[side.framing if side.what == "images" else side.what]  # noqa: E731
        tasks = image_tasks([data.dialogues[0]] * 3)
        return {at: recall_at(places(of(t.queries), of(t.gallery), t.right)[:, 0])["r1"] for at, t in tasks.items()}

    found = r1(images)
    assert found["1_rounds"] == pytest.approx(100 / 3) and found["2_rounds"] == 100
    assert found["1_rounds_authors"] == 0, "for each image all dialogues tie"
    assert found["2_rounds_authors"] == 100
    assert r1(images.flip(0))["2_rounds_authors"] == pytest.approx(100 / 3)


@torch.no_grad()
def test_the_authors_protocols_see_the_image_pressed_into_a_square(toy_model, data, tmp_path, monkeypatch):
    for number, talk in enumerate(data.dialogues):
        image = Image.fromarray(np.random.default_rng(number).integers(0, 256, (4, 9, 3), dtype=np.uint8))
        image.resize((180, 80)).save(tmp_path / f"{number}.png")
        data.dialogues[number] = replace(talk, image=tmp_path / f"{number}.png")
    vision, asked, found = toy_model.vision, {}, []
    whole = [Image.open(talk.image) for talk in data.dialogues]
    own = vision(torch.stack([vision.transform(image) for image in whole])).float()
    squares = vision(torch.stack([pil_to_tensor(image.resize(vision.image_size[::-1])) for image in whole])).float()
    assert (own - squares).abs().amax() > 1e-2
    for name in ("our_prompt", "authors_prompt"):
        keep = getattr(visdial, name)
        note = lambda *args, name=name, keep=keep: asked.setdefault(name, []).append(args[2]) or keep(*args)  # noqa: E731
        at = "answers" if name == "our_prompt" else "answers_authors"
        monkeypatch.setitem(ANSWER_PROTOCOLS, at, ANSWER_PROTOCOLS[at]._replace(prompt=note))
    plain = contextual.places
    monkeypatch.setattr(contextual, "places", lambda *args: found.append(args) or plain(*args))
    report = evaluate(toy_model, data)
    for name, features in (("our_prompt", own), ("authors_prompt", squares)):
        torch.testing.assert_close(torch.stack(asked[name]), features.repeat_interleave(2, 0))
    clip = toy_model.vision.text_tower()
    tasks = image_tasks(data.dialogues)
    assert len(found) == 2 * len(tasks)
    for (queries, gallery, *_), (name, embed) in zip(
        found, [(at, embed) for embed in (toy_model.embed_images, clip.embed_features) for at in tasks], strict=True
    ):
        authors = name.endswith("_authors")
        torch.testing.assert_close(queries if authors else gallery, embed(squares if authors else own))
    assert all("square" in report["protocol"][at] for at in ("answers_authors", "N_rounds_authors"))


def test_scores_of_another_framing_are_refused(toy_model, data, tmp_path, monkeypatch):
    features = features_of(toy_model, data)
    score_answers(toy_model, data.dialogues[:1], features, tmp_path)
    for protocols in (list(ANSWER_PROTOCOLS), dict.fromkeys(ANSWER_PROTOCOLS, "own")):
        about = json.loads((tmp_path / "about.json").read_text()) | {"protocols": protocols}
        (tmp_path / "about.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match="name another --scores"):
            score_answers(toy_model, data.dialogues[:1], features, tmp_path)


def test_the_whole_evaluation(toy_model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(visdial, "PUBLISHED", 2)
    report = evaluate(toy_model, data, scores=tmp_path / "scores")
    assert report["gallery"] == 2 and report["candidates"] == 7
    assert {"answers", "answers_authors", "0_rounds", "2_rounds", "2_rounds_authors"} <= report["fromage"].keys()
    assert "answers" not in report["clip"] and report["clip"].keys() | set(ANSWER_PROTOCOLS) == report["chance"].keys()
    assert report["fromage"]["answers"].keys() == {"ndcg", "mrr", "r1", "r5", "r10", "mean_rank"}
    assert report["paper"]["fromage"]["answers_authors"]["mrr"] == 22.0
    gone = Dialogue(tmp_path / "gone.jpg", *[getattr(data.dialogues[0], n) for n in ("rounds", "rated", "relevance")])
    some = Dialogues("three", [gone, *data.dialogues])
    fewer = evaluate(toy_model, some, Options(max_lost=0.5, clip=False), answers=False)
    assert fewer["skipped"]["dialogues with a lost image"] == 1 and "answers" not in fewer["fromage"]
    monkeypatch.undo()
    assert not evaluate(toy_model, data, Options(clip=False), answers=False)["paper"], "of other dialogues"
    assert all(fewer["fromage"][f"{n}_rounds"] == report["fromage"][f"{n}_rounds"] for n in range(3))
