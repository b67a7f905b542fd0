import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fromage.data.tokenizer import IMAGE_TOKEN, PromptTokenizer
from fromage.errors import UserError
from fromage.models.frozen import TOY
from fromage.octopus.answers import answer_ids, read_indexed, read_text
from fromage.octopus.boxes import spelled
from fromage.octopus.collate import objects_of
from fromage.octopus.examples import Example
from fromage.octopus.queries import QUERY, index_token_names
from fromage.octopus.step import point_at_queries

A, B, C = (0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 1.0, 0.75), (0.0, 0.0, 0.25, 0.125)


def tokenizer(n):
    return PromptTokenizer(str(TOY / "opt"), index_token_names(n), (IMAGE_TOKEN, QUERY))


def example(*answer, boxes=(A, B, C)):
    return Example("k", "p.jpg", "where?", answer, boxes)


def test_index_tokens_number_the_objects_meant_in_the_answers_order():
    t = tokenizer(4)
    ids = answer_ids(example("a star", 2, " and ", 0, 2), t, 4)
    d = t.trained_ids
    assert ids == [*t.encode("a star"), d[0], *t.encode(" and "), d[1], d[0], 2]
    objects = objects_of([example("a star", 2, " and ", 0)], 4)
    torch.testing.assert_close(objects.boxes[0, 0], torch.tensor([0.125, 0.0625, 0.25, 0.125]))
    assert objects.counts == [2], "the other object is background"


def test_without_queries_boxes_are_spelled_and_read_again():
    t = tokenizer(0)
    ids = answer_ids(example("a star", 0, " and ", 1), t, 0)
    answer = read_text(t.decode(ids))
    assert answer.pieces == ["a star", A, " and ", B] and answer.boxes == [A, B] and answer.words == "a star and"
    assert len(t.encode(spelled(A))) == 25


@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4))
def test_spelling_keeps_three_decimals(values):
    box = tuple(value / 1000 for value in values)
    proper = box[0] < box[2] and box[1] < box[3]
    assert read_text(spelled(box)).boxes == ([box] if proper else [])


@pytest.mark.parametrize(
    "text",
    ["[0.500,0.200,0.300,0.400]", "[1.100,0.200,1.300,0.400]", "[1,2,3,4]", "[0.100,0.200,0.300]", "[,,,]", "[0.1"],
)
def test_what_is_no_box_stays_text(text):
    assert read_text(text).pieces == [text] and not read_text(text).boxes


def test_pieces_and_candidates_of_index_tokens():
    t = tokenizer(3)
    answer = read_indexed([*t.encode("a star"), t.trained_ids[1], t.trained_ids[2]], t, [A, B, C], [0.1, 0.7, 0.2])
    assert answer.text == "a star<d1><d2>" and answer.pieces == ["a star", B, C] and answer.queries == [1, 2]
    assert answer.candidates == [(B, 0.7), (C, 0.2), (A, 0.1)] and answer.pointed == [(B, 0.7), (C, 0.2)]


def test_two_queries_with_the_same_box_keep_their_scores():
    t = tokenizer(2)
    assert [read_indexed([t.trained_ids[i]], t, [A, A], [0.9, 0.1]).pointed for i in (0, 1)] == [[(A, 0.9)], [(A, 0.1)]]


def test_an_index_out_of_range_is_an_error():
    t = tokenizer(3)
    with pytest.raises(UserError, match="<d2>, but only 2"):
        read_indexed([t.trained_ids[2]], t, [A, B], [0.5, 0.5])


def test_more_boxes_than_queries():
    with pytest.raises(UserError, match="3 boxes, more than 2"):
        answer_ids(example(0, 1, 2), tokenizer(2), 2)


def test_no_box():
    assert objects_of([example("yes", boxes=())], 3).boxes.shape == (1, 0, 4)


def test_objects_become_the_queries_matched_with_them():
    answers, owners = torch.tensor([5, 100, 101, 2, 101, 7, 2]), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    matched = torch.tensor([[3, 0], [1, 2]])
    assert point_at_queries(answers, owners, matched, 100).tolist() == [5, 103, 100, 2, 102, 7, 2]
    assert point_at_queries(answers, owners, torch.zeros(2, 0, dtype=torch.long), 200).tolist() == answers.tolist()
