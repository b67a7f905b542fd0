"""Answers for official scorers: the file, runs that are killed and go on, what is refused, VQA accuracy."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_octopus import save_untrained

from fromage.cli.main import main
from fromage.errors import UserError
from fromage.evals import answers as answering
from fromage.evals.answer_file import AnswerFile
from fromage.evals.answers import evaluate
from fromage.evals.options import Options
from fromage.evals.questions import read_questions
from fromage.evals.report import table
from fromage.evals.vqa import HumanAnswers
from fromage.models.fromage import Fromage
from fromage.octopus.model import load_octopus

FIELDS = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return str(save_untrained(tmp_path_factory.mktemp("octopus") / "last.ckpt"))


@pytest.fixture(scope="module")
def octopus(ckpt):
    return load_octopus(ckpt)


@pytest.fixture
def rows():
    """Ten questions about three images, one about none; ids are numbers or texts."""
    rows = [{"question_id": i, "image": f"{i % 3}.png", "text": f"what is shown {i}?", "category": "c"} for i in range(9)]
    return [*rows[:4], {"question_id": "text-only", "text": "how many sides has a square?"}, *rows[4:]]


@pytest.fixture
def data(rows, tmp_path):
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 9, 9)).save(tmp_path / f"{number}.png")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_questions(tmp_path / "questions.jsonl", tmp_path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_question_has_a_line_in_llavas_form_and_order(octopus, data, rows, tmp_path):
    out = tmp_path / "new" / "answers.jsonl"
    report = evaluate(octopus, data, out, Options(3), 4, model_id="ours")
    written = lines(out)
    assert [list(line) for line in written] == [FIELDS] * 10
    assert [(line["question_id"], line["prompt"]) for line in written] == [(row["question_id"], row["text"]) for row in rows]
    assert {line["model_id"] for line in written} == {"ours"} and len({line["answer_id"] for line in written}) == 10
    assert not out.with_name("answers.jsonl.part").exists() and not list(out.parent.glob(".*"))
    assert report["octopus"]["all"].keys() == {"words", "seconds"} and report["answers"] == 10 and report["images"] == 3
    alone = evaluate(octopus, data, tmp_path / "alone.jsonl", Options(1), 4, model_id="ours")
    assert (
        lines(tmp_path / "alone.jsonl") == written and alone["octopus"]["all"]["words"] == report["octopus"]["all"]["words"]
    )


def test_answers_of_quantised_layers_have_a_name_of_their_own(octopus, data, tmp_path, monkeypatch):
    monkeypatch.setattr(octopus.lm, "quantized", "nf4")
    report = evaluate(octopus, data, tmp_path / "answers.jsonl", Options(3), 4)
    assert {line["model_id"] for line in lines(tmp_path / "answers.jsonl")} == {f"octopus-{octopus.fingerprint()}-nf4"}
    assert report["quantized"] == "nf4"


class Killed(BaseException):
    """Stands for a signal."""


@pytest.fixture
def dying(monkeypatch):
    """Let a run die before so many batches, and list what was asked."""
    whole, asked = answering.answer, []

    def die(after):
        def answer(model, some, length):
            if len(asked) == after:
                raise Killed
            asked.append([text for _, text in some])
            return whole(model, some, length)

        monkeypatch.setattr(answering, "answer", answer)
        return asked

    return die


@pytest.mark.parametrize("half", [b"", b'{"question_id": 8, "prom', b'{"question_id": 8}\n{"question_id": 1', b"\xff\n"])
def test_a_killed_run_goes_on_and_no_half_line_counts(octopus, data, dying, half, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    evaluate(octopus, data, whole, Options(3), 4)
    asked = dying(2)
    with pytest.raises(Killed):
        evaluate(octopus, data, out, Options(3), 4)
    assert not out.exists() and sum(map(len, asked)) == 6
    with (tmp_path / "answers.jsonl.part").open("ab") as part:
        part.write(half)
    rest = dying(-1)
    rest.clear()
    report = evaluate(octopus, data, out, Options(3), 4)
    assert sum(map(len, rest)) == 4 and report["answered_before"] == 6 and report["answers"] == 10
    assert out.read_bytes() == whole.read_bytes()


def test_what_another_run_began_is_refused_without_overwrite(octopus, data, dying, tmp_path):
    out = tmp_path / "answers.jsonl"
    dying(1)
    with pytest.raises(Killed):
        evaluate(octopus, data, out, Options(3), 4)
    fewer = read_questions(data.file, tmp_path, limit=5)
    dying(-1)
    for about, said in (
        ({"data": fewer}, "questions"),
        ({"max_new_tokens": 5}, "length 4 there, 5 here"),
        ({"model_id": "x"}, "model_id"),
    ):
        told = {"data": data, "max_new_tokens": 4} | about
        with pytest.raises(UserError, match=rf"answers\.jsonl\.part: answers of another run \({said}.*--overwrite"):
            evaluate(octopus, out=out, options=Options(3), **told)
    other = Fromage.load(k=1, q=8)
    with pytest.raises(UserError, match=r"another run \(checkpoint"):
        evaluate(other, data, out, Options(3), 4)
    evaluate(other, data, out, Options(3), 4, overwrite=True)
    assert len(lines(out)) == 10
    with pytest.raises(UserError, match=r"answers\.jsonl: is there already"):
        evaluate(octopus, data, out, Options(3), 4)
    evaluate(octopus, data, out, Options(3), 4, overwrite=True)
    assert {line["model_id"] for line in lines(out)} == {f"octopus-{octopus.fingerprint()}"}
    (tmp_path / "b.jsonl.part").write_text("a shopping list\n")
    with pytest.raises(UserError, match="is no file of answers that a run was writing"):
        evaluate(octopus, data, tmp_path / "b.jsonl", Options(3), 4)


@pytest.mark.parametrize("other", ["images", "language_model"])
def test_answers_of_other_images_or_another_language_model_are_refused(data, dying, tmp_path, monkeypatch, other):
    model, out = Fromage.load(k=1, q=8), tmp_path / "answers.jsonl"
    dying(1)
    with pytest.raises(Killed):
        evaluate(model, data, out, Options(3), 4)
    name = model.fingerprint()
    if other == "images":
        shutil.copytree(tmp_path, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("elsewhere"))
        data = read_questions(data.file, tmp_path / "elsewhere")
    else:
        with torch.no_grad():
            next(model.lm.parameters()).add_(1)
    assert model.fingerprint() == name
    dying(-1)
    with pytest.raises(UserError, match=rf"another run \({other} "):
        evaluate(model, data, out, Options(3), 4)


def test_overwrite_begins_again_and_without_it_that_run_goes_on(octopus, data, dying, tmp_path):
    out = tmp_path / "answers.jsonl"
    evaluate(octopus, data, out, Options(3), 4)
    asked = dying(1)
    for _ in range(2):
        asked.clear()
        with pytest.raises(Killed):
            evaluate(octopus, data, out, Options(3), 4, overwrite=True)
        assert sum(map(len, asked)) == 3, "from the first question on"
    dying(-1).clear()
    assert evaluate(octopus, data, out, Options(3), 4)["answered_before"] == 3 and len(lines(out)) == 10


def test_a_file_belongs_to_the_run_that_writes_it(tmp_path):
    def again():
        with AnswerFile(tmp_path / "a.jsonl", {"checkpoint": "1"}) as file:
            return file.answered

    with AnswerFile(tmp_path / "a.jsonl", {"checkpoint": "1"}) as first, ThreadPoolExecutor(1) as other:
        first.add([{"question_id": 1, "text": "yes"}])
        with pytest.raises(UserError, match="is in use by process"):
            other.submit(again).result()
    assert again() == {1: {"question_id": 1, "text": "yes"}}


def test_a_run_that_was_killed_at_its_first_line_begins_anew(tmp_path):
    (tmp_path / "b.jsonl.part").write_bytes(b'{"about"')
    with AnswerFile(tmp_path / "b.jsonl", {"checkpoint": "1"}) as begun:
        assert begun.answered == {}
        assert lines(tmp_path / "b.jsonl.part") == [{"about": {"checkpoint": "1"}}]
    assert not (tmp_path / "b.jsonl.part").exists(), "without an answer there is nothing to go on from"


def test_fromage_answers_too(data, tmp_path):
    report = evaluate(Fromage.load(k=1, q=8), data, tmp_path / "answers.jsonl", Options(4), 4)
    assert len(lines(tmp_path / "answers.jsonl")) == 10 and "fromage" in report and "octopus" not in report


def test_accuracy_where_annotations_are_given(octopus, data, monkeypatch, tmp_path):
    monkeypatch.setattr(
        answering, "answer", lambda model, some, length: ["Two." if "1" in text else "red" for _, text in some]
    )
    said = {i: HumanAnswers(["2"] * 2 + ["red"] * 8, "number" if i < 2 else "other") for i in range(4)}
    report = evaluate(octopus, data, tmp_path / "answers.jsonl", Options(4), 4, said)
    found = report["octopus"]
    assert found["all"]["accuracy"] == pytest.approx((3 * 100 + 60) / 4) and report["annotated"] == 4
    assert found["number"] == {"accuracy": pytest.approx(80)} and found["other"] == {"accuracy": 100}
    assert list(found) == ["all", "number", "other"] and "number" in table(report)
    by_image = {data.questions[0].image.name: said[0]}
    report = evaluate(octopus, data, tmp_path / "c.jsonl", Options(4), 4, by_image)
    asked = [question for question in data.questions if question.image and question.image.name in by_image]
    assert report["annotated"] == len(asked) > 0 and report["octopus"]["number"]["accuracy"] > 0
    with pytest.raises(UserError, match="none of its questions is in the annotations"):
        evaluate(octopus, data, tmp_path / "b.jsonl", annotations={77: said[0]})


def test_questions_with_a_lost_image_are_counted_and_asked_again(octopus, data, tmp_path):
    (tmp_path / "1.png").unlink()
    out = tmp_path / "answers.jsonl"
    report = evaluate(octopus, data, out, Options(4, max_lost=0.5), 4)
    assert report["skipped"] == {"images missing": 1, "images broken": 0, "odd entries": 0, "questions with a lost image": 3}
    assert len(lines(out)) == 7 == report["answers"]


def test_sciences_file_is_read_and_odd_questions_named(tmp_path):
    talk = [{"from": "human", "value": "Which?\nA. one\nB. two\n<image>"}, {"from": "gpt", "value": "A"}]
    rows = [{"id": str(i), "conversations": talk} | ({"image": f"{i}.png"} if i else {}) for i in range(40)]
    (tmp_path / "science.json").write_text(json.dumps([*rows, {"id": "41"}]))
    with pytest.warns(UserWarning, match=r"1 of 41 entries are odd \(entry \[40\] lacks conversations\) and left out"):
        found = read_questions(tmp_path / "science.json", tmp_path)
    assert found.questions[0].image is None and found.questions[1].image == tmp_path / "1.png" and found.odd == 1
    assert found.questions[2].asked == "Which?\nA. one\nB. two"
    line = {"question_id": 1, "image": "a.png", "text": "what?"}
    for content, said in (
        ("", "holds no question"),
        ("\n".join([json.dumps(line)] * 2), "question 1 is there twice"),
        (json.dumps(line | {"text": None}), "text is null"),
        (json.dumps(line | {"text": " <image> "}), "asks nothing"),
        ("no JSON", "line 1 is no JSON"),
        ("[1, 2", "is no JSON"),
        ('["text"]', "is the text 'text', not an object"),
    ):
        (tmp_path / "q.jsonl").write_text(content)
        with pytest.raises(UserError, match=said):
            read_questions(tmp_path / "q.jsonl", tmp_path)


def test_the_verb_writes_answers_and_a_report(ckpt, data, tmp_path, capsys):
    notes = [{"question_id": i, "answer_type": "other", "answers": [{"answer": "red"}] * 10} for i in range(9)]
    (tmp_path / "notes.json").write_text(json.dumps({"annotations": notes}))
    words = ["eval", "answers", str(data.file), "--images", str(tmp_path), "--ckpt", ckpt, "--max-new-tokens", "3"]
    words += ["--answers-file", f"{tmp_path}/answers.jsonl"]
    assert main([*words, "--annotations", f"{tmp_path}/notes.json", "--json", f"{tmp_path}/report.json"]) == 0
    assert "accuracy" in capsys.readouterr().out and len(lines(tmp_path / "answers.jsonl")) == 10
    assert json.loads((tmp_path / "report.json").read_text())["octopus"]["all"]["accuracy"] >= 0
    assert main(words) == 2 and "is there already" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--limit", "2"]) == 0 and len(lines(tmp_path / "answers.jsonl")) == 2
    assert main([*words[:-1], f"{tmp_path}/answers.json"]) == 2 and "ends in .jsonl" in capsys.readouterr().err


def test_lost_images_are_a_share_of_all_images_however_often_it_is_killed(octopus, data, dying, tmp_path):
    """Questions whose image is lost have no answer, so they are among what a killed run leaves: here two of two images."""
    (tmp_path / "2.png").unlink()
    dying(2)
    with pytest.raises(Killed):
        evaluate(octopus, data, tmp_path / "a.jsonl", Options(4, max_lost=0.4), 4)
    dying(-1)
    report = evaluate(octopus, data, tmp_path / "a.jsonl", Options(4, max_lost=0.4), 4)
    assert report["answered_before"] == 6 and report["answers"] == 7
    with pytest.raises(UserError, match="1 of 3 images"):
        evaluate(octopus, data, tmp_path / "b.jsonl", Options(4, max_lost=0.3), 4)


@pytest.mark.parametrize("kind", [Fromage, load_octopus])
def test_questions_that_are_too_long_are_left_out_and_told(kind, ckpt, rows, data, tmp_path):
    model = Fromage.load(q=8) if kind is Fromage else kind(ckpt)
    rows[2]["text"] += " star" * 3000
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = read_questions(tmp_path / "questions.jsonl", tmp_path)
    with pytest.warns(UserWarning, match=r"answer included; 1 questions are longer \(2\), and left out"):
        report = evaluate(model, long, tmp_path / "answers.jsonl", Options(4), 4)
    assert [line["question_id"] for line in lines(tmp_path / "answers.jsonl")] == [0, 1, 3, "text-only", *range(4, 9)]
    assert report["skipped"]["questions too long"] == 1 and report["answers"] == 9
    only = replace(long, questions=[long.questions[2]])
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"short enough; .*max-new-tokens"):
        evaluate(model, only, tmp_path / "none.jsonl", Options(4), 4)
    assert not (tmp_path / "none.jsonl").exists()
