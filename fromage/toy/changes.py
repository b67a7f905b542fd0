"""A scene, words for one change of it, and the scene that comes of it: queries of composed retrieval.

The toy language model knows the words: 'the star becomes blue', 'at night', 'here is a big red moon at the top'.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from fromage.toy.language import AT, WHEN, phrase
from fromage.toy.scenes import COLOURS, GROUNDS, PLACES, SHAPES, SIZES, TIMES, Scene, Thing

KINDS = ("colour", "size", "place", "ground", "time", "add")
VALUES: dict[str, Sequence[str]] = {"colour": [*COLOURS], "size": [*SIZES], "place": [*PLACES]}
SAYS = {
    "colour": ("the {shape} becomes {}", "now the {shape} is {}"),
    "size": ("the {shape} is {} now", "now the {shape} is {}"),
    "place": ("the {shape} is {} now", "now the {shape} is {}"),
    "ground": ("on the {}", "we come to the {}"),
    "time": ("{}", "it is {} now"),
    "add": ("here is {}", "and {}"),
}
MOST = 3  # objects of a scene, as sample_scene has them


class Change(NamedTuple):
    """What is said, of which kind it is, and the scene that is meant."""

    kind: str
    words: str
    scene: Scene


def fitting(scene: Scene, kinds: Sequence[str] = KINDS) -> list[str]:
    """The kinds of change that a scene can have: where there are three objects, none is added."""
    return [kind for kind in kinds if kind != "add" or len(scene.things) < MOST]


def change(scene: Scene, rng: random.Random, kinds: Sequence[str] = KINDS) -> Change:
    """Draw a change of a scene of at most three objects, of one of the kinds.

    Shapes and colours still differ within the scene, no two objects share a place, and there are at most three: an object is
    added where there are fewer.
    """
    kind = rng.choice(fitting(scene, kinds))
    changed, word, shape = _DRAW[kind](scene, rng, kind)
    return Change(kind, rng.choice(SAYS[kind]).format(word, shape=shape), changed)


Drawn = tuple[Scene, str, str]  # the scene, the word for what is new, and the shape it is about


def _of_thing(scene: Scene, rng: random.Random, what: str) -> Drawn:
    """Another colour, size or place of one object."""
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    taken = {getattr(thing, what)} if what == "size" else {getattr(other, what) for other in scene.things}
    value = rng.choice([each for each in VALUES[what] if each not in taken])
    things = (*scene.things[:index], replace(thing, **{what: value}), *scene.things[index + 1 :])
    return replace(scene, things=things), AT.get(value, value), thing.shape


def _ground(scene: Scene, rng: random.Random, _: str) -> Drawn:
    ground = rng.choice([each for each in GROUNDS if each != scene.ground])
    return replace(scene, ground=ground), ground, ""


def _time(scene: Scene, rng: random.Random, _: str) -> Drawn:
    (time,) = (each for each in TIMES if each != scene.time)
    return replace(scene, time=time), WHEN[time], ""


def _add(scene: Scene, rng: random.Random, _: str) -> Drawn:
    shape, colour, place = (
        rng.choice([each for each in known if each not in {getattr(thing, what) for thing in scene.things}])
        for what, known in (("shape", SHAPES), ("colour", [*COLOURS]), ("place", [*PLACES]))
    )
    thing = Thing(shape, colour, rng.choice([*SIZES]), place)
    return replace(scene, things=(*scene.things, thing)), phrase(thing, rng, 1.0), shape


_DRAW: dict[str, Callable[[Scene, random.Random, str], Drawn]] = {
    "colour": _of_thing,
    "size": _of_thing,
    "place": _of_thing,
    "ground": _ground,
    "time": _time,
    "add": _add,
}
