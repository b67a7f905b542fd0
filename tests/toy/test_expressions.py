"""Referring expressions: whom they mean, by a reading of their words that shares nothing with the writing of them."""

import random
import re
from collections import Counter

import pytest

from fromage.toy.expressions import (
    MOST,
    RELATIONS,
    Meaning,
    describes,
    expression,
    is_exact,
    meaning_of,
    meant_by,
    related,
    words,
)
from fromage.toy.questions import COUNTS, absent, turns, yes_no
from fromage.toy.scenes import PIXELS, SHAPES, Scene, Thing, draw, sample_crowded_scene, sample_scenes

RED = Thing("star", "red", "small", "left")
BLUE = Thing("star", "blue", "big", "middle")
RING = Thing("ring", "red", "big", "right")
MOON = Thing("moon", "red", "small", "top")
SCENES = sample_scenes(random.Random(0), "train", 150, sample_crowded_scene)
EXTREMES = {"leftmost": (0, -1), "rightmost": (0, 1), "highest": (1, -1), "lowest": (1, 1)}


def read(text: str, scene: Scene, centres, heights) -> list[int]:
    """The objects that an English noun phrase means, by the pixels of the drawn image where it speaks of positions."""
    text = text.removeprefix("the ").removeprefix("a ").removeprefix("an ")
    if found := re.search(r" (left of|right of|above|below) (the .*)", text):
        (anchor,) = read(found[2], scene, centres, heights)
        axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[found[1]]
        fits = read(text[: found.start()], scene, centres, heights)
        return [i for i in fits if sign * (centres[i][axis] - centres[anchor][axis]) > 0.15 * PIXELS]
    first, _, rest = text.partition(" ")
    if first in EXTREMES or first in ("biggest", "smallest"):
        fits = read(rest, scene, centres, heights)
        axis, sign = EXTREMES.get(first, (0, 0))
        values = [sign * centres[i][axis] if sign else heights[i] * (1 if first == "biggest" else -1) for i in fits]
        first, second = sorted(values)[-1:-3:-1]  # an extreme needs another one to be compared with
        return [fits[values.index(first)]] if first - second > (0.15 * PIXELS if sign else 3) else []
    place = re.search(r" at the (\w+)$", text)
    said = set(text[: place.start() if place else None].split()) - {"one"}
    fits = [i for i, t in enumerate(scene.things) if said <= {t.shape, t.colour, t.size}]
    return [i for i in fits if not place or scene.things[i].place == place[1]]


@pytest.mark.parametrize(
    ("meaning", "meant"),
    [
        (Meaning("star"), (0, 1)),
        (Meaning("star", "red"), (0,)),
        (Meaning(colour="red", size="small"), (0, 3)),
        (Meaning("star", relation="left of", anchor=Meaning("ring")), (0, 1)),
        (Meaning("star", relation="left of", anchor=Meaning("star", "blue")), (0,)),
        (Meaning(relation="above", anchor=Meaning("ring")), (3,)),
        (Meaning(relation="right of", anchor=Meaning("star")), ()),  # of which star?
        (Meaning(most="leftmost"), (0,)),
        (Meaning(most="highest"), (3,)),
        (Meaning(most="lowest"), ()),  # three are equally low
        (Meaning("star", most="biggest"), (1,)),
        (Meaning(most="biggest"), ()),
        (Meaning("moon", most="leftmost"), ()),  # of a single moon one does not say so
    ],
)
def test_whom_a_meaning_means(meaning, meant):
    assert meant_by(meaning, (RED, BLUE, RING, MOON)) == meant


def test_relations_are_opposites_and_of_different_objects():
    for scene in SCENES:
        for a in scene.things:
            assert not any(related(a, name, a) for name in RELATIONS)
            for b in scene.things:
                assert related(a, "left of", b) == related(b, "right of", a)
                assert related(a, "above", b) == related(b, "below", a)
                assert a is b or any(related(a, name, b) for name in RELATIONS)


def test_expressions_mean_one_object_to_a_reader_who_sees_the_image():
    rng = random.Random(1)
    for i, scene in enumerate(SCENES):
        _, marks = draw(scene, i)
        centres, heights = [(x + w / 2, y + h / 2) for (x, y, w, h), _ in marks], [SIZE[t.size] for t in scene.things]
        for index in range(len(scene.things)):
            text = expression(scene, index, rng)
            assert read(text, scene, centres, heights) == [index], (text, scene)


SIZE = {"small": 9, "big": 15}


def test_about_half_need_a_relation_or_two_attributes_and_every_kind_occurs():
    rng = random.Random(2)
    found = [(s, i, meaning_of(s, i, rng)) for s in SCENES for i in range(len(s.things))]
    exact = [is_exact(meaning, i, scene.things) for scene, i, meaning in found]
    assert sum(exact) > 0.95 * len(exact)  # the others name the place where the shape would do
    meanings = [meaning for _, _, meaning in found]
    hard = [m for m in meanings if m.relation or sum(map(bool, (m.colour, m.size, m.place))) > 1]
    assert 0.38 < len(hard) / len(meanings) < 0.62
    assert {m.relation for m in meanings} == {None, *RELATIONS} and {m.most for m in meanings} == {None, *MOST}


@pytest.mark.parametrize("unsaid", ["shape", "colour", "size"])
def test_what_is_asked_for_is_not_said(unsaid):
    rng = random.Random(3)
    for scene in SCENES:
        meaning = meaning_of(scene, 0, rng, unsaid=unsaid)
        assert meant_by(meaning, scene.things) == (0,)
        assert getattr(meaning, unsaid) is None and not (meaning.anchor and getattr(meaning.anchor, unsaid))
        assert unsaid != "size" or meaning.most not in ("biggest", "smallest")


def test_words():
    ring = Meaning("ring")
    assert words(Meaning("star", size="small", relation="left of", anchor=ring)) == "the small star left of the ring"
    assert words(Meaning(colour="red", most="leftmost")) == "the leftmost red one"
    assert words(Meaning("arrow", place="top"), "a") == "an arrow at the top"
    assert words(Meaning("cross", "red"), "", plural=True) == "red crosses"


@pytest.mark.parametrize(
    ("phrase", "right"),
    [
        ("a small star", True),
        (" and a red star at the left", True),
        ("two stars", True),
        ("a star", True),
        ("a big star", False),
        ("a red ring", False),
        ("a star at the top", False),
        ("a red one", False),
        ("", False),
    ],
)
def test_a_phrase_describes_what_has_all_it_names(phrase, right):
    assert describes(phrase, Thing("star", "red", "small", "left")) is right


def test_what_is_absent_is_absent_and_nearly_there():
    rng = random.Random(4)
    for scene in SCENES:
        missing = absent(scene, ("colour", "shape"), rng)
        assert not meant_by(missing, scene.things)
        seen = {t.colour for t in scene.things} | {t.shape for t in scene.things}
        combined = {(t.colour, t.shape) for t in scene.things}
        every = len({c for c, _ in combined}) * len({s for _, s in combined})
        assert len(seen & {missing.colour, missing.shape}) == (2 if every > len(combined) else 1)


def test_yes_and_no_are_asked_in_the_same_words():
    rng = random.Random(5)
    forms = Counter()
    for scene in SCENES:
        for answer, text in zip((1, -1), yes_no(scene, rng)[:2], strict=True):
            found = set(re.findall(r"\w+", text))
            forms["small" in found or "big" in found, "at" in found, len(found)] += answer
            asked = text.removeprefix("is there ").removesuffix("?")
            assert bool(read(asked, scene, None, None)) == (answer == 1)
    assert not any(forms.values())


def test_answers_about_a_scene_are_true():
    rng, numbers, counts = random.Random(6), Counter(), Counter()
    for i, scene in enumerate(SCENES):
        _, marks = draw(scene, i)
        centres, heights = [(x + w / 2, y + h / 2) for (x, y, w, h), _ in marks], [SIZE[t.size] for t in scene.things]
        asked = turns(scene, rng)
        assert sorted(a[0] for q, a in asked if q.startswith("is there")) == ["no", "yes"]
        for question, answer in asked:
            text = question.removesuffix("?")
            if text.startswith("how many"):
                counts[answer] += 1
                assert answer == (COUNTS[len(read(singular(text[9:-10]), scene, centres, heights))],)
            elif text.startswith("where"):
                meant = read(singular(text.removeprefix("where is ").removeprefix("where are ")), scene, centres, heights)
                numbers[len(answer)] += 1
                assert sorted(answer) == meant
            elif found := re.match(r"what is (left of|right of|above|below) ", text):
                pointed = [piece for piece in answer if isinstance(piece, int)]
                assert sorted(pointed) == read(f"one {text[8:]}", scene, centres, heights)
                assert pointed or answer == ("nothing",)
                for said, number in zip(answer[::2], answer[1::2], strict=False):
                    assert number in read(said.removeprefix("and "), scene, centres, heights), found
            elif not text.startswith("is there"):
                (index,) = read(re.search("the .*", text.removesuffix(" small or big"))[0], scene, centres, heights)
                thing = scene.things[index]
                assert answer[0] in (thing.shape, thing.colour, thing.size)
    assert set(numbers) == {1, 2, 3, 4} and len(counts) == 5


def singular(text: str) -> str:
    """'the red stars' as 'red star'; objects and ones alike as 'one'."""
    for shape in SHAPES:
        text = re.sub(rf"\b{shape}(e?s)\b", shape, text)
    return re.sub(r"\b(objects|ones)\b", "one", text)
