"""Questions about a scene, and answers that point at its objects: a number in an answer is the number of an object."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

from fromage.toy.expressions import ATTRIBUTES, RELATIONS, Meaning, expression, meaning_of, meant_by, words
from fromage.toy.language import NUMBERS
from fromage.toy.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene

Answer = tuple[str | int, ...]
Turn = tuple[str, Answer]

COUNTS = (*NUMBERS, "four")
VALUES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "place": tuple(PLACES)}
KINDS = (("shape",), ("colour", "shape"), ("size", "shape"), ("shape", "place"))
GROUPS = [kind for n in range(4) for kind in combinations(("shape", "colour", "size"), n)]
ASKS = {"colour": "what colour is {}?", "size": "is {} small or big?", "shape": "what shape is {}?"}


def turns(scene: Scene, rng: random.Random) -> list[Turn]:
    """One question of each kind about a scene, and one yes and one no question, in random order."""
    yes, no, _ = yes_no(scene, rng)
    asked = [ask(scene, rng) for ask in (count, attribute, where, relation)]
    return rng.sample([(yes, ("yes",)), (no, ("no",)), *asked], 2 + len(asked))


def yes_no(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    """Two questions of one form; the answer to the first is yes, to the second no. Third, what they ask beside the shape."""
    kind = rng.choice(KINDS)
    there, missing = _said(scene, rng.randrange(len(scene.things)), kind), absent(scene, kind, rng)
    what = next((name for name in kind if name != "shape"), "shape")
    return f"is there {words(there, 'a')}?", f"is there {words(missing, 'a')}?", what


def absent(scene: Scene, kind: Sequence[str], rng: random.Random) -> Meaning:
    """A description that fits no object, made hard: each word fits some object, or all words but one do."""
    there = {tuple(getattr(thing, what) for what in kind) for thing in scene.things}
    seen = [{values[i] for values in there} for i in range(len(kind))]
    missing = [values for values in product(*(VALUES[what] for what in kind)) if values not in there]
    hardness = [sum(value in known for value, known in zip(values, seen, strict=True)) for values in missing]
    hardest = [values for values, hard in zip(missing, hardness, strict=True) if hard == max(hardness)]
    return _saying(kind, rng.choice(hardest))


def count(scene: Scene, rng: random.Random) -> Turn:
    """How many objects of a kind there are, from none to all."""
    numbers = _groups(scene)
    number = rng.choice((0, *numbers))
    asked = rng.choice(numbers[number]) if number else absent(scene, rng.choice(KINDS[:3]), rng)
    return f"how many {_plural(asked)} are there?", (COUNTS[number],)


def attribute(scene: Scene, rng: random.Random) -> Turn:
    """The colour, size or shape of one object; the question names the object without this attribute."""
    what, index = rng.choice(list(ASKS)), rng.randrange(len(scene.things))
    asked = meaning_of(scene, index, rng, unsaid=what)
    return ASKS[what].format(words(asked)), (getattr(scene.things[index], what),)


def where(scene: Scene, rng: random.Random) -> Turn:
    """Where one object is or several are; the answer points at them in reading order."""
    groups = _groups(scene)
    number = rng.choice(list(groups))
    if number == 1:
        index = rng.randrange(len(scene.things))
        return f"where is {expression(scene, index, rng)}?", (index,)
    asked = rng.choice(groups[number])
    return f"where are the {_plural(asked)}?", tuple(in_order(scene, meant_by(asked, scene.things)))


def relation(scene: Scene, rng: random.Random) -> Turn:
    """The objects left of (right of, above, below) an object: each is named and pointed at, or 'nothing'."""
    index, name = rng.randrange(len(scene.things)), rng.choice(list(RELATIONS))
    anchor = meaning_of(scene, index, rng, {"plain": 2, "two": 1})
    found = in_order(scene, meant_by(Meaning(relation=name, anchor=anchor), scene.things))
    answer: list[str | int] = []
    for place, number in enumerate(found):
        text = words(_said(scene, number, ("colour", "shape")), "a")
        answer += [text if not place else f"and {text}", number]
    return f"what is {name} {words(anchor)}?", tuple(answer) or ("nothing",)


def in_order(scene: Scene, numbers: Sequence[int]) -> list[int]:
    """Objects from left to right, and from top to bottom, by their places."""
    return sorted(numbers, key=lambda number: PLACES[scene.things[number].place])


def _said(scene: Scene, index: int, kind: Sequence[str]) -> Meaning:
    return _saying(kind, [getattr(scene.things[index], what) for what in kind])


def _saying(kind: Sequence[str], values: Sequence[str]) -> Meaning:
    named: dict[str, Any] = dict(zip(kind, values, strict=True))
    return Meaning(**named)


def _groups(scene: Scene) -> dict[int, list[Meaning]]:
    """All combinations of shape, colour and size of some objects, by the number of objects that fit them."""
    found: dict[int, dict[Meaning, None]] = {}
    for index, kind in product(range(len(scene.things)), GROUPS):
        said = _said(scene, index, kind)
        found.setdefault(len(meant_by(said, scene.things)), {})[said] = None
    return {number: list(found[number]) for number in sorted(found)}


def _plural(meaning: Meaning) -> str:
    return words(meaning, "", plural=True) if any(getattr(meaning, what) for what in ATTRIBUTES) else "objects"
