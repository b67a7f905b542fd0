"""VQA accuracy: the formula on its published values, and answers as the official evaluation compares them."""

import json

import pytest

from fromage.errors import UserError
from fromage.evals.vqa import CONTRACTIONS, accuracy, normalised, read_vqa


@pytest.mark.parametrize(("agree", "value"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_by_how_many_of_ten_said_the_same(agree, value):
    """As the authors of VQA state them: any four of ten suffice, and three make 0.9."""
    assert accuracy("dog", ["dog"] * agree + ["cat"] * (10 - agree)) == pytest.approx(value)


def test_accuracy_is_the_mean_over_nine_others():
    said = ["2", "two", "2", "3", "3", "a lot", "2.", "many", "many", "many"]
    for answer in ("2", "Two.", "3", "many"):
        theirs, own = [normalised(each) for each in said], normalised(answer)
        nines = [[each for j, each in enumerate(theirs) if j != i] for i in range(10)]
        assert accuracy(answer, said) == pytest.approx(sum(min(1, nine.count(own) / 3) for nine in nines) / 10), answer


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The Dog.", "dog"), ("two dogs", "2 dogs"), (" A  cat\nand\tan owl", "cat and owl"), ("none", "0"),
        ("1,000", "1000"), ("1.5", "1.5"), ("p.m.", "pm"), ("black/white", "black white"), ("black / white", "black white"),
        ("yes, it is", "yes it is"), ("t-shirt", "t shirt"), ("dont", "don't"), ("don't", "don't"),
        ("couldnt've", "couldn't've"),
        ("oclock", "o'clock"), ("im", "im"), ("What?!", "what"),
    ],
)  # fmt: skip
def test_answers_are_compared_as_officially(text, wanted):
    assert normalised(text) == wanted


def test_a_contraction_is_known_by_its_letters():
    assert len(CONTRACTIONS) > 90 and all("'" in word and "'" not in key for key, word in CONTRACTIONS.items())


def test_unanimous_answers_of_people_are_taken_as_they_are():
    assert accuracy("yes", ["yes "] * 10) == accuracy("yes", ["yes "] * 5 + ["yes"] * 5) == 1
    assert accuracy("A dog", ["a dog"] * 10) == 0 and accuracy("A dog", ["a dog"] * 9 + ["dog"]) == 1


def test_annotations_of_vizwiz_are_read_by_the_images_names(tmp_path):
    """Its val.json is a list without ids: each image has one question."""
    answers = [{"answer": text, "answer_confidence": "yes"} for text in ("soup", "tomato soup")]
    notes = [{"image": "VizWiz_val_00000000.jpg", "question": "What is this?", "answers": answers, "answer_type": "other"}]
    path = tmp_path / "val.json"
    path.write_text(json.dumps([{**notes[0], "answerable": 1}]))
    assert read_vqa(path) == {"VizWiz_val_00000000.jpg": (["soup", "tomato soup"], "other")}
    path.write_text(json.dumps([{**notes[0], "image": 7}]))
    with pytest.raises(UserError, match=r"annotations\[0\]\.image is"):
        read_vqa(path)


def test_annotations_are_read_and_odd_ones_named(tmp_path):
    notes = [
        {"question_id": i, "answer_type": "number", "answers": [{"answer": "2", "answer_id": 1}] * 10} for i in range(30)
    ]
    notes += [{"question_id": 99, "answers": []}, {"question_id": 100, "answers": [{"answer": "x"}]}]
    path = tmp_path / "notes.json"
    path.write_text(json.dumps({"annotations": notes}))
    found = read_vqa(path)
    assert len(found) == 31 and found[3] == (["2"] * 10, "number") and found[100].kind == ""
    for content, said in (
        ("[]", "has no annotations"),
        ('{"annotations": [{"question_id": 1, "answers": ["2"]}]}', r"annotations\[0\]\.answers\[0\] is the text '2'"),
        ("no", "is no JSON"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            read_vqa(path)


def test_a_question_with_few_answers_is_told_of(tmp_path):
    notes = [{"question_id": i, "answers": [{"answer": "cat"}] * n} for i, n in enumerate((3, 4, 10))]
    (tmp_path / "a.json").write_text(json.dumps({"annotations": notes}))
    with pytest.warns(UserWarning, match="1 of 3 questions have at most 3 answers"):
        found = read_vqa(tmp_path / "a.json")
    assert accuracy("cat", found[0].answers) < 1 == accuracy("cat", found[1].answers)
