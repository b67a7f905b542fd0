"""ChatIR: hits by round, plain and cumulative, as the published evaluation counts them."""

import json
import random

import pytest
import torch

from fromage.errors import UserError
from fromage.evals import base, chatir
from fromage.evals.chatir import chance_by_round, evaluate, hits_by_round, read_chats
from fromage.evals.options import Options
from fromage.models.encode_files import encode_files


@pytest.fixture
def files(world):
    folder = world / "composed" / "chatir"
    return folder / "VisDial_v1.0_queries_val.json", folder / "Search_Space_val_50k.json", world / "composed" / "circo"


def first_hits(ranks, limit):
    """For each dialogue the first round with a rank below the limit, None for none: ranks[round][dialogue], from 0."""
    return [next((n for n, row in enumerate(ranks) if row[i] < limit), None) for i in range(len(ranks[0]))]


@torch.no_grad()
def test_rounds_are_evaluated_as_the_authors_do(toy_model, files, tmp_path, monkeypatch):
    monkeypatch.setattr(chatir, "HITS", 3)
    monkeypatch.setattr(base, "_rounded", dict)  # reports keep four digits
    pool, images = files[1:]
    talks, names = json.loads(files[0].read_text()), json.loads(pool.read_text())
    talks = [talk | {"dialog": talk["dialog"][:4]} for talk in talks]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    report = evaluate(toy_model, read_chats(tmp_path / "talks.json", pool, images))
    features = encode_files(toy_model, [images / name for name in names], Options()).features
    clip = toy_model.vision.text_tower()
    for who, text, image in (
        ("fromage", toy_model.embed_text, toy_model.embed_images),
        ("clip", clip.embed_text, clip.embed_features),
    ):
        gallery, ranks = image(features), []
        for n in range(4):
            rows = text([", ".join(talk["dialog"][: n + 1]) for talk in talks])
            orders = (rows.double() @ gallery.double().T).argsort(descending=True, dim=1).tolist()
            ranks.append([order.index(names.index(talk["img"])) for order, talk in zip(orders, talks, strict=True)])
        first = first_hits(ranks, 3)
        for n in range(4):
            plain = sum(rank < 3 for rank in ranks[n]) * 100 / len(talks)
            cumulative = sum(hit is not None and hit <= n for hit in first) * 100 / len(talks)
            assert report[who][f"round_{n}"] == {
                "hits10": pytest.approx(plain, abs=1e-6),
                "hits10_cumulative": pytest.approx(cumulative, abs=1e-6),
            }
    assert report["gallery"] == len(names) and report["queries"] == len(talks) and report["paper"] == {}


def test_a_hit_counts_in_all_later_rounds():
    """Ranks by hand, of four dialogues in three rounds: hits in 0 and 2; in 1; in none; in 2."""
    places = [torch.tensor(row).unsqueeze(1) for row in ([10, 11, 50, 12], [30, 1, 11, 11], [2, 99, 12, 10])]
    assert hits_by_round(places) == {
        "round_0": {"hits10": 25.0, "hits10_cumulative": 25.0},
        "round_1": {"hits10": 25.0, "hits10_cumulative": 50.0},
        "round_2": {"hits10": 50.0, "hits10_cumulative": 75.0},
    }


def test_chance_is_the_mean_of_random_orders():
    rng = random.Random(0)
    drawn = [torch.tensor([[rng.randint(1, 40)] for _ in range(4000)]) for _ in range(3)]
    found, want = hits_by_round(drawn), chance_by_round(40, 2)
    assert found.keys() == want.keys()
    for at, figures in found.items():
        assert figures == {name: pytest.approx(want[at][name], abs=2.5) for name in figures}


def test_published_figures_stand_beside_the_published_files(files, monkeypatch):
    assert chatir.published(read_chats(*files)) == {}
    monkeypatch.setattr(chatir, "POOL", len(json.loads(files[1].read_text())))
    monkeypatch.setattr(chatir, "DIALOGUES", len(json.loads(files[0].read_text())))
    rows = chatir.published(read_chats(*files))["ChatIR BLIP"]
    assert rows == {"round_0": {"hits10_cumulative": 64.0}, "round_5": {"hits10_cumulative": 75.0}}
    assert chatir.published(read_chats(*files, limit=2)) == {}


def test_published_figures_are_of_the_whole_pool(toy_model, files, monkeypatch, tmp_path):
    monkeypatch.setattr(chatir, "published", lambda data: {"ChatIR BLIP": {"round_0": {"hits10_cumulative": 64.0}}})
    data = read_chats(*files, limit=2)
    assert evaluate(toy_model, data, Options(clip=False))["paper"]
    data.pool.append(tmp_path / "missing.jpg")
    report = evaluate(toy_model, data, Options(clip=False, max_lost=0.5))
    assert report["queries"] == 2 and not report["paper"], "no dialogue is lost, but an image of the pool"


def test_what_does_not_fit_together_is_refused(files, tmp_path):
    dialogues, pool, images = files
    (tmp_path / "pool.json").write_text(json.dumps(json.loads(pool.read_text())[:1]))
    with pytest.raises(UserError, match=r"pool\.json: lacks \d+ images of the dialogues"):
        read_chats(dialogues, tmp_path / "pool.json", images)
    with pytest.raises(UserError, match="is a list of images, and not dialogues of ChatIR"):
        read_chats(pool, pool, images)
    talks = [talk | {"dialog": []} for talk in json.loads(dialogues.read_text())]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    with pytest.raises(UserError, match="not a list of texts"):
        read_chats(tmp_path / "talks.json", pool, images)
