"""Referring expressions: their meanings, the objects they refer to, and their text."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from fromage.toy.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing

CLEARLY = 0.25  # relative to the image; two places differ by 0.3 or not at all, and jitter changes that by at most 0.05
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # y grows downwards
MOST: dict[str, Callable[[Thing], float]] = {
    "leftmost": lambda thing: -PLACES[thing.place][0],
    "rightmost": lambda thing: PLACES[thing.place][0],
    "highest": lambda thing: -PLACES[thing.place][1],
    "lowest": lambda thing: PLACES[thing.place][1],
    "biggest": lambda thing: SIZES[thing.size],
    "smallest": lambda thing: -SIZES[thing.size],
}
BY_SIZE = ("biggest", "smallest")  # of MOST, those that looks alone decide
ATTRIBUTES = ("shape", "colour", "size", "place")
SHARES = {"plain": 10, "two": 40, "relation": 40, "most": 10}  # how often each kind is tried; plain ones fit most often
TRIES = 12  # kinds tried per expression


@dataclass(frozen=True)
class Meaning:
    """What an expression says, None for what it does not: attributes, a relation to another object, a superlative.

    Attributes:
        most: a key of MOST: alone the most so among two or more to whom all the rest applies.
        relation: a key of RELATIONS, to the one object that `anchor` means.
    """

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None
    most: str | None = None
    relation: str | None = None
    anchor: Meaning | None = None


def meant_by(meaning: Meaning, things: Sequence[Thing]) -> tuple[int, ...]:
    """The numbers of the objects that fit a meaning; none if its anchor is not a single object."""
    fits = [number for number, thing in enumerate(things) if _applies(meaning, thing)]
    if meaning.relation and meaning.anchor:
        anchors = meant_by(meaning.anchor, things)
        single = things[anchors[0]] if len(anchors) == 1 else None
        fits = [i for i in fits if single and related(things[i], meaning.relation, single)]
    if meaning.most:
        measures = [MOST[meaning.most](things[i]) for i in fits]
        alone = len(fits) > 1 and measures.count(max(measures)) == 1
        fits = [fits[measures.index(max(measures))]] if alone else []
    return tuple(fits)


def _applies(meaning: Meaning, thing: Thing) -> bool:
    looks = meaning.shape in (None, thing.shape) and meaning.colour in (None, thing.colour)
    return looks and meaning.size in (None, thing.size) and meaning.place in (None, thing.place)


def related(thing: Thing, relation: str, other: Thing) -> bool:
    """Whether a thing is clearly left of, right of, above or below another, by their places."""
    (x, y), (there_x, there_y), (right, down) = PLACES[thing.place], PLACES[other.place], RELATIONS[relation]
    return (x - there_x) * right + (y - there_y) * down >= CLEARLY


def words(meaning: Meaning, article: str = "the", plural: bool = False) -> str:
    """A meaning as a noun phrase: 'the small star left of the ring', 'the leftmost red one'; article: 'the', 'a' or ''."""
    noun = meaning.shape or "one"
    if plural:
        noun = f"{noun}{'es' if noun.endswith('s') else 's'}"
    parts = [meaning.most, meaning.size, meaning.colour, noun, meaning.place and f"at the {meaning.place}"]
    parts += [meaning.relation, words(meaning.anchor) if meaning.anchor else None]
    text = " ".join(part for part in parts if part)
    return " ".join(filter(None, ["an" if article == "a" and text[0] in "aeiou" else article, text]))


def describes(phrase: str, thing: Thing) -> bool:
    """Whether a phrase of attributes, as captions have them, names a thing's shape and no attribute that it lacks."""
    shapes = {words(Meaning(shape), "", plural): shape for shape in SHAPES for plural in (False, True)}
    read = [shapes.get(word, word) for word in re.findall(r"\w+", phrase)]
    named = {word for word in read if word in {*SHAPES, *COLOURS, *SIZES, *PLACES}}
    return thing.shape in named and named <= {thing.shape, thing.colour, thing.size, thing.place}


def expression(scene: Scene, index: int, rng: random.Random) -> str:
    """A phrase that means object `index` of a scene and no other."""
    return words(meaning_of(scene, index, rng))


def by_looks(scene: Scene, index: int, rng: random.Random) -> str | None:
    """A phrase that means object `index` and no other by colour, size and shape alone; None where looks do not suffice."""
    exact = _exact_looks(scene, index)
    return words(rng.choice(exact)) if exact else None


@lru_cache(maxsize=1)  # several phrases are drawn for each object
def _exact_looks(scene: Scene, index: int) -> tuple[Meaning, ...]:
    thing = scene.things[index]
    parts = product((thing.shape, None), (thing.colour, None), (thing.size, None), (None, *BY_SIZE))
    said = (Meaning(shape, colour, size, most=most) for shape, colour, size, most in parts)
    return tuple(meaning for meaning in said if is_exact(meaning, index, scene.things))


def at_length(scene: Scene, index: int, rng: random.Random) -> str:
    """A phrase that means object `index` and no other: all of its looks, and its relation to another or its place."""

    def looks(thing: Thing) -> Meaning:
        return Meaning(thing.shape, thing.colour, thing.size)

    thing, others = scene.things[index], [other for i, other in enumerate(scene.things) if i != index]
    said = [replace(looks(thing), place=thing.place)]
    for other in others:
        relations = [name for name in RELATIONS if related(thing, name, other)]
        said += [replace(looks(thing), relation=name, anchor=looks(other)) for name in relations]
    return words(rng.choice([meaning for meaning in said if meant_by(meaning, scene.things) == (index,)]))


def meaning_of(
    scene: Scene, index: int, rng: random.Random, shares: Mapping[str, int] = SHARES, unsaid: str | None = None
) -> Meaning:
    """A random meaning that only object `index` fits; every part of it is needed, except possibly the shape.

    Args:
        shares: of the kinds that are tried: attributes alone (none or one beside the shape: plain; two), with a relation,
            with a superlative (most).
        unsaid: an attribute that is not to be said of the object, nor of the anchor.
    """
    thing = scene.things[index]
    kinds = rng.choices(list(shares), list(shares.values()), k=TRIES)
    for drawn in (_draw(kind, scene, index, rng) for kind in kinds for _ in range(1 if kind == "two" else 4)):
        if not (unsaid and _says(drawn, unsaid)) and is_exact(drawn, index, scene.things):
            return drawn
    return Meaning(shape=thing.shape if unsaid != "shape" else None, place=thing.place)  # no two share a place


def _says(meaning: Meaning, what: str) -> bool:
    by_size = what == "size" and meaning.most in BY_SIZE
    return bool(by_size or getattr(meaning, what) or (meaning.anchor and _says(meaning.anchor, what)))


def is_exact(meaning: Meaning, index: int, things: Sequence[Thing]) -> bool:
    """Whether exactly one object fits a meaning, and more would if any part except the shape were left out."""
    if meant_by(meaning, things) != (index,):
        return False
    parts = [{what: None} for what in ("colour", "size", "place", "most") if getattr(meaning, what)]
    parts += [{"relation": None, "anchor": None}] if meaning.relation else []
    return all(meant_by(replace(meaning, **part), things) != (index,) for part in parts)  # type: ignore[arg-type]


def _draw(kind: str, scene: Scene, index: int, rng: random.Random) -> Meaning:
    """A meaning of one of the kinds in SHARES that is true of an object; for a relation, if there is one."""
    thing = scene.things[index]
    shape = thing.shape if kind == "two" or rng.random() < 0.8 else None
    among = ("colour", "size", "place") if kind == "plain" else ("colour", "size")
    count = 2 if kind == "two" else rng.choice((0, 0, 1))
    said = Meaning(shape, **{what: getattr(thing, what) for what in rng.sample(among, count)})
    if kind == "most":
        return replace(said, most=rng.choice(list(MOST)))
    if kind == "relation" and len(scene.things) > 1:
        other = rng.choice([i for i in range(len(scene.things)) if i != index])
        relations = [name for name in RELATIONS if related(thing, name, scene.things[other])]
        return replace(said, relation=rng.choice(relations), anchor=_anchor(scene, other, rng))
    return said


def _anchor(scene: Scene, index: int, rng: random.Random) -> Meaning:
    """The shape of an object, with its colour or size if the shape alone is ambiguous; it can still be ambiguous."""
    thing = scene.things[index]
    plain = Meaning(thing.shape)
    if meant_by(plain, scene.things) == (index,):
        return plain
    what = rng.choice(("colour", "size"))
    return replace(plain, **{what: getattr(thing, what)})
