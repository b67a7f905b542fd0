"""Figures on captioned photographs, here of toy scenes by the toy towers."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from fromage.errors import UserError
from fromage.generation import ret_tuning
from fromage.models.fromage import Fromage
from fromage.models.frozen import TOY

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import photo_figures
import run_photos
from photo_figures import Photographs, PhotoQuestion, Ridge

WORDS = ["a red star", "a blue ring", "a green square", "a yellow circle", "a small cross", "a large moon"]


@pytest.fixture(scope="module")
def model():
    return Fromage.load(k=2, q=16).eval()


@pytest.fixture(scope="module")
def data(model):
    torch.manual_seed(0)
    texts = [[f"{word} {place}" for place in ("at night", "at noon", "left", "right", "alone")] for word in WORDS]
    return Photographs(torch.randn(len(WORDS), model.vision.width), texts, [f"{i}.jpg" for i in range(len(WORDS))])


def test_the_linear_baseline_finds_what_it_was_fitted_to_and_not_other_photographs(model, data):
    fitted = Ridge(model, data, 1e-4)
    other = data._replace(features=torch.randn(len(WORDS), model.vision.width))
    assert fitted.recalls(data)["t2i_r1"] == 100 and fitted.recalls(other)["t2i_r1"] < 60
    assert photo_figures.chance(50) == {"t2i_r1": 2, "t2i_r5": 10, "t2i_r10": 20}


def test_queries_grow_by_captions_turns_and_photographs(model, data, monkeypatch):
    asked = []
    embed = type(model).embed_text
    monkeypatch.setattr(
        type(model), "embed_text", lambda self, prompts, **o: asked.extend(prompts) or embed(self, prompts, **o)
    )
    short = data._replace(captions=[*data.captions[:-1], data.captions[-1][:3]])
    found = photo_figures.growing(model, short)
    kinds = ("text", "dialogue", "others between", "mean")
    assert set(found) == {f"{kind}, {n}" for kind in kinds for n in range(1, 6)}
    assert found["text, 1"] == found["mean, 1"] == found["others between, 1"]
    assert " ".join(data.captions[0]) in asked, "five captions of one photograph"
    between = next(prompt for prompt in asked if isinstance(prompt, list) and len(prompt) == 9)
    assert between[::2] == data.captions[0]
    near = [next(i for i, v in enumerate(data.features) if torch.equal(v, part)) for part in between[1::2]]
    assert len({0, *near}) == 5, "four others, none of them the photograph itself"
    assert f"Q: what is in the picture?\nA: {data.captions[0][0]}" in asked
    assert not any(data.captions[-1][0] in str(prompt) for prompt in asked), "one with fewer captions is none of the queries"
    unseen = photo_figures.growing(model, short, seen=False)
    assert unseen == {name: value for name, value in found.items() if "others between" not in name}


def test_questions_are_asked_as_often_where_the_answer_is_yes(data, tmp_path):
    images = [{"id": i, "file_name": name} for i, name in enumerate(data.names)]
    boxes = [
        {"image_id": i, "category_id": kind} for i, kind in [(0, 7), (0, 7), (1, 7), (2, 8), (3, 8), (4, 8), (5, 8), (0, 8)]
    ]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "dog"}, {"id": 8, "name": "cat"}]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    found = photo_figures.ask(tmp_path / "boxes.json", data)
    dogs = [question for question in found["yes or no"] if "dog" in question.text]
    assert [(q.photograph, q.right) for q in dogs] == [(0, 0), (2, 1), (1, 0), (3, 1)]
    assert len([q for q in found["yes or no"] if "cat" in q.text]) == 2, "cats are missing in one photograph only"
    assert {(q.photograph, q.answers[q.right]) for q in found["how many"] if "dog" in q.text} == {(0, " two"), (1, " one")}


def test_an_answer_is_the_likeliest_with_the_photographs_or_without(data, monkeypatch):
    prompts = []

    def score(model, prompt, answers):
        prompts.append(prompt)
        return argparse.Namespace(total=torch.tensor([0.0, 1.0]))

    monkeypatch.setattr(photo_figures, "score", score)
    questions = [PhotoQuestion(i, f"{i}?", (" Yes", " No"), int(i > 0)) for i in range(3)]
    found = photo_figures.answers(None, data, questions, 1)
    assert found == {"right": pytest.approx(200 / 3), "right without images": pytest.approx(200 / 3)}
    assert len(prompts[0]) == 4 and prompts[0][3] == "Question: 0? Answer:" and prompts[0][1].endswith((" Yes\n", " No\n"))
    assert prompts[0][2] is not prompts[0][0] and torch.equal(prompts[0][2], data.features[0])
    assert len(prompts) == 6 and all(isinstance(part, str) for prompt in prompts[3:] for part in prompt)


def test_a_picture_comes_when_asked_for_by_a_bias_that_the_other_half_chose(model, monkeypatch):
    texts = json.loads((Path(run_photos.__file__).parent / "photo_requests.json").read_text())
    assert {kind: len(set(some)) for kind, some in texts.items()} == {"images": 50, "words": 50}
    margins, given = ret_tuning.ret_margins, []
    few = {kind: some[:6] for kind, some in texts.items()}
    monkeypatch.setattr(photo_figures, "read_messages", lambda path: few)

    def parted(model, prompts, decoding):
        given.append([prompt[-1] for prompt in prompts])
        return margins(model, prompts, decoding) * 0 + (-5.0 if len(given) == 1 else -9.0)

    monkeypatch.setattr(ret_tuning, "ret_margins", parted)
    found = photo_figures.asking(model, "alone")
    assert given == [few["images"][::2], few["words"][::2]], "the others judge"
    assert found["bias"] == 7 and found["right where it was chosen"] == 100
    assert found["right"] == (found["images, with bias"] + 100 - found["words, with bias"]) / 2
    monkeypatch.setattr(ret_tuning, "ret_margins", lambda *given: margins(*given) * 0 - 9e3)
    found = photo_figures.asking(model, "dialogue")
    assert found["images, with bias"] == found["words, with bias"] == 100 and found["right"] == 50


def test_requests_are_measured_beside_base(model, monkeypatch):
    args = argparse.Namespace(out=Path("o"), choose=False, coco=None, judged=Path("j.json"))
    monkeypatch.setattr(run_photos, "read", lambda places: None)
    asked = {name: [part for part in run_photos.parts(name, args, model) if "asking" in part] for name in run_photos.ROWS}
    assert {name for name, some in asked.items() if some} == run_photos.ASKED and asked["base"] == asked["requests"]
    requests, base = (run_photos.words_of(name, args.out, args.choose) for name in ("requests", "base"))
    changed = {*requests} - {*base}
    assert changed == {"--data.requests=0.2"}
    columns = [name.partition(".") for name in run_photos.COMES]
    assert {part for part, _, _ in columns} == set(asked["base"])
    assert {name for _, _, name in columns} == {
        f"{kind}, {by}" for kind in ("images", "words") for by in ("as trained", "with bias")
    }


def test_a_row_is_trained_and_judged_once(world, tmp_path, monkeypatch, capsys):
    listed = world / "coco" / "annotations" / "captions_val2017.json"
    monkeypatch.setattr(run_photos, "LM", "toy")
    monkeypatch.setattr(run_photos, "VISION", "toy")
    for name, given in {"get": lambda name: None, "folder_of": lambda name: TOY / "opt"}.items():
        monkeypatch.setattr(run_photos, name, given)
    monkeypatch.setattr(photo_figures, "caption_figures", lambda made, wanted: {"cider": float(len(made)), "bleu4": 0.0})
    words = ["--train", listed, "--judged", listed, "--images", world / "coco" / "val2017", "--out", tmp_path / "study"]
    words += [
        "--held-out",
        "0.3",
        "--only",
        "captions k2",
        "last token",
        "--seeds",
        "0",
        "--threads",
        "1",
        "--json",
        tmp_path / "f.json",
    ]
    few = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.batch_size=8", "--model.q=16"]
    monkeypatch.setattr("sys.argv", ["run_photos.py", *map(str, words), "--", *few, "--trainer.enable_progress_bar=false"])
    run_photos.main()
    told = json.loads((tmp_path / "f.json").read_text())
    count = len(json.loads(listed.read_text())["images"])
    assert told["figures"]["captions k2"]["captions.cider"]["mean"] == count, "captions alone, and of all photographs"
    assert (
        "photographs.t2i_r1" not in told["figures"]["captions k2"] and "captions.cider" not in told["figures"]["last token"]
    )
    assert (
        told["runs"]["linear"]["none"]["figures"]["weight"] in run_photos.RIDGE
        and "| captions k2 | " in capsys.readouterr().out
    )
    with monkeypatch.context() as patch:
        patch.setattr(run_photos, "recalls", lambda *_: pytest.fail("measured twice"))
        run_photos.main()
    assert json.loads((tmp_path / "f.json").read_text()) == told

    monkeypatch.setattr("sys.argv", [*sys.argv, "--model.lr=1e-4"])
    with pytest.raises(UserError, match="holds a training of"):
        run_photos.main()

    content, other = json.loads(listed.read_text()), tmp_path / "five.json"
    content["images"] = content["images"][:5]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
    other.write_text(json.dumps(content))
    argv = [
        {str(tmp_path / "f.json"): str(tmp_path / "g.json"), "captions k2": "last token"}.get(word, word)
        for word in sys.argv[:-1]
    ]
    argv[argv.index("--judged") + 1] = str(other)
    monkeypatch.setattr("sys.argv", argv)
    run_photos.main()
    of_five = json.loads((tmp_path / "g.json").read_text())
    assert of_five["figures"]["chance"]["photographs.t2i_r1"]["mean"] == 20, "figures of the other file's photographs"
    assert of_five["setting"] == told["setting"] | {"judged": "five.json"}

    same_name = tmp_path / "elsewhere" / "five.json"
    same_name.parent.mkdir()
    same_name.write_text(other.read_text())
    argv[argv.index("--judged") + 1] = str(same_name)
    with pytest.raises(UserError, match="photographs of another source"):
        run_photos.main()


def test_a_choice_is_judged_on_photographs_held_out_of_training(world, tmp_path, monkeypatch):
    listed, images = world / "coco" / "annotations" / "captions_val2017.json", world / "coco" / "val2017"
    monkeypatch.setattr(run_photos, "get", lambda name: None)
    monkeypatch.setattr(run_photos, "folder_of", lambda name: TOY / "opt")
    monkeypatch.setattr(run_photos, "VISION", "toy")
    args = argparse.Namespace(train=listed, images=images, judged=tmp_path / "test.json", coco=None, held_out=0.3)
    args.out, args.choose = tmp_path, True  # the file that judges is not there, and is not missed
    run_photos.prepare(args)
    count, held_out = len(json.loads(listed.read_text())["images"]), run_photos.read([tmp_path / "features" / "held_out"])
    trained = run_photos.read([tmp_path / "features" / "train"])
    assert run_photos.judges(args) == "held_out" and len(held_out.names) + len(trained.names) == count
    assert 0 < len(held_out.names) < len(trained.names) and not {*held_out.names} & {*trained.names}


def test_a_run_names_the_commits_of_parts_that_were_measured_later():
    parts = {
        "a": {"commit": "1", "setting": {"train": 1, "judged": 2}, "figures": {"x": 1.0}},
        "b": {"commit": "2", "setting": {"train": 1, "coco": 3}, "figures": {"y": 2.0}},
    }
    assert run_photos.together(parts) == {
        "commit": "1",
        "later": {"b": "2"},
        "setting": {"train": 1, "judged": 2, "coco": 3},
        "figures": {"a.x": 1.0, "b.y": 2.0},
    }
    assert "later" not in run_photos.together({"a": parts["a"]})
