"""Tuples of the toy world by rule: a scene, what is to change in it, and the scene that this makes, drawn too."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from fromage.errors import UserError
from fromage.io import whole_folder
from fromage.toy.language import AT, WHEN, caption, phrase
from fromage.toy.scenes import COLOURS, PLACES, SHAPES, SIZES, TIMES, Scene, Thing, sample_scene
from fromage.toy.writers import encode

MOST = 3  # objects of a scene, as sample_scene draws them
LINES = "tuples.jsonl"
TRIES, MOST_CHANGES = 8, 4  # draws of a change until one fits; changes of a reference image, at most


class Change(NamedTuple):
    """What is asked for: the words, and the scene they lead to."""

    condition: str
    scene: Scene


def _colour(scene: Scene, rng: random.Random) -> Change | None:
    thing = rng.choice(scene.things)
    colour = rng.choice([name for name in COLOURS if name not in {t.colour for t in scene.things}])
    said = rng.choice(("but the {} is {}.", "make the {} {}.", "the same with the {} in {}."))
    return Change(said.format(thing.shape, colour), _with(scene, thing, replace(thing, colour=colour)))


def _move(scene: Scene, rng: random.Random) -> Change | None:
    thing = rng.choice(scene.things)
    place = rng.choice([name for name in PLACES if name not in {t.place for t in scene.things}])
    said = rng.choice(("but the {} is {}.", "move the {}, {}.", "the same with the {} {}."))
    return Change(said.format(thing.shape, AT[place]), _with(scene, thing, replace(thing, place=place)))


def _add(scene: Scene, rng: random.Random) -> Change | None:
    if len(scene.things) == MOST:
        return None
    taken = [{getattr(t, name) for t in scene.things} for name in ("shape", "colour", "place")]
    free = [[x for x in all_ if x not in used] for all_, used in zip((SHAPES, COLOURS, PLACES), taken, strict=True)]
    shape, colour, place = (rng.choice(some) for some in free)
    thing = Thing(shape, colour, rng.choice(list(SIZES)), place)
    said = rng.choice(("and {}.", "with {} too.", "add {}."))
    return Change(said.format(phrase(thing, rng, keep=1.0)), replace(scene, things=(*scene.things, thing)))


def _time(scene: Scene, rng: random.Random) -> Change | None:
    time = next(name for name in TIMES if name != scene.time)
    return Change(rng.choice(("but {}.", "the same {}.", "{} instead.")).format(WHEN[time]), replace(scene, time=time))


def _with(scene: Scene, thing: Thing, other: Thing) -> Scene:
    return replace(scene, things=tuple(other if t is thing else t for t in scene.things))


CHANGES: dict[str, Callable[[Scene, random.Random], Change | None]] = {
    "colour": _colour,
    "add": _add,
    "move": _move,
    "time": _time,
}


class ToyTuple(NamedTuple):
    """A scene and changes of it to other scenes, each of one of the CHANGES. All scenes are of the same split."""

    scene: Scene
    changes: dict[str, Change]  # by the key of their scene
    kinds: list[str]  # of each


def sample_tuples(rng: random.Random, split: str, changes: int = 1) -> Iterator[ToyTuple]:
    """References with so many changes each, without end; no scene of one is a scene of another."""
    seen: set[str] = set()
    while True:
        one = _sample(rng, split, changes)
        if one is not None and not (keys := {one.scene.key, *one.changes}) & seen:
            seen |= keys
            yield one


def _sample(rng: random.Random, split: str, changes: int) -> ToyTuple | None:
    """A reference and its changes; None where too few are found.

    Kinds take turns, in random order. Only a tenth of the changes of a scene lead to one of 'val', so several are tried.
    """
    scene, order = sample_scene(rng, split), rng.sample(list(CHANGES), len(CHANGES))
    found: dict[str, Change] = {}
    kinds = [kind for _, kind in zip(range(changes), cycle(order), strict=False)]
    for kind in kinds:
        tried = (CHANGES[kind](scene, rng) for _ in range(TRIES))
        change = next((c for c in tried if c is not None and c.scene.split == split and c.scene.key not in found), None)
        if change is None:
            return None
        found[change.scene.key] = change
    return ToyTuple(scene, found, kinds)


def make_tuples(
    out: Path, count: int = 8192, split: str = "train", changes: int = 1, seed: int = 0, progress: bool = True
) -> dict[str, int]:
    """Write a folder: tuples.jsonl, for `fromage shards tuples`, and the images of it. Returns the tuples of each kind.

    The same bytes for the same arguments. Tuples of 'val' are of scenes that no training has seen, targets included.
    changes: tuples of each reference image, one behind the other; with several the image alone does not tell which target
    is asked for. Raises UserError for numbers out of range, and where another process writes there.
    """
    if count < 1 or not 1 <= changes <= MOST_CHANGES:
        raise UserError(f"--count {count} --changes {changes}: give a count from 1, changes from 1 to {MOST_CHANGES}")
    rng, counts = random.Random(f"{seed}/tuples/{split}"), dict.fromkeys(CHANGES, 0)
    with whole_folder(Path(out).resolve()) as draft:
        (draft / "images").mkdir()
        made, entries = sample_tuples(rng, split, changes), list[dict[str, Any]]()
        with tqdm(total=count, desc="tuples", unit="", disable=not progress) as bar:
            while len(entries) < count:
                entries += _write(draft, range(len(entries), count), next(made), rng)
                bar.update(len(entries) - bar.n)
        for entry in entries:
            counts[entry["kind"]] += 1
        (draft / LINES).write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")
    return counts


def _write(folder: Path, numbers: range, one: ToyTuple, rng: random.Random) -> list[dict[str, Any]]:
    """Draw the images of a reference and its changes; returns their lines, with the keys of both scenes besides.

    numbers: those that are left for tuples; further changes are left out.
    """
    reference, said = f"images/{numbers[0]:06d}.jpg", caption(one.scene, rng)
    (folder / reference).write_bytes(encode((one.scene, numbers[0]))[0])
    lines = []
    for i, kind, change in zip(numbers, one.kinds, one.changes.values(), strict=False):
        shown = f"images/{i:06d}_target.jpg"
        (folder / shown).write_bytes(encode((change.scene, i))[0])
        line = {"image": reference, "caption": said, "condition": change.condition}
        line |= {"target_caption": caption(change.scene, rng), "target_image": shown, "kind": kind}
        lines.append(line | {"scene": one.scene.key, "target_scene": change.scene.key})
    return lines
