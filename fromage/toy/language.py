"""Text about scenes: captions, stories, dialogues."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from fromage.toy.scenes import COLOURS, GROUNDS, PLACES, SHAPES, SIZES, TIMES, Scene, Thing, sample_scene

AT = {place: f"at the {place}" for place in PLACES}
WHEN = {"day": "by day", "night": "at night"}
NUMBERS = ("zero", "one", "two", "three")


def phrase(thing: Thing, rng: random.Random, keep: float = 0.9) -> str:
    """An object as a noun phrase; size and place are each included with probability keep, colour and shape always."""
    size = f"{thing.size} " if rng.random() < keep else ""
    place = f" {AT[thing.place]}" if rng.random() < keep else ""
    words = f"{size}{thing.colour} {thing.shape}{place}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(scene: Scene, rng: random.Random, keep: float = 0.9) -> str:
    """One sentence about a scene: every object in random order, and mostly the ground and the time."""
    things = _listed([phrase(t, rng, keep) for t in rng.sample(scene.things, len(scene.things))])
    ground = f"on the {scene.ground}" if rng.random() < keep else ""
    when = WHEN[scene.time] if rng.random() < keep else ""
    setting = " ".join(part for part in (ground, when) if part)
    if not setting:
        return f"{things}."
    return f"{things}, {setting}." if rng.random() < 0.6 else f"{setting}, {things}."


@dataclass(frozen=True)
class ToyStory:
    """Five scenes with a sentence each. All sentences together describe the last scene."""

    scenes: tuple[Scene, ...]
    sentences: tuple[str, ...]


_SAYS: dict[str, tuple[str, ...]] = {
    "shape": ("here is the {}.", "this is about the {}."),
    "colour": ("the {shape} becomes {}.", "now the {shape} is {}."),
    "size": ("the {shape} is {} now.", "it is {} now."),
    "place": ("the {shape} is {} now.", "then it is {}."),
    "ground": ("we come to the {}.", "it lies on the {}."),
    "time": ("it is {} now.", "this is {}."),
}


def _set(scene: Scene, what: str, value: str) -> Scene:
    if what in ("ground", "time"):
        return replace(scene, **{what: value})  # type: ignore[arg-type]
    return replace(scene, things=(replace(scene.things[0], **{what: value}),))


def story(rng: random.Random, split: str) -> ToyStory:
    """A story about one object that changes: each sentence tells one of six attributes of the last scene.

    An image shows what was said so far; what is said only later still looks different. The sixth attribute stays
    unsaid: the images alone show it, the same in all five.
    """
    while True:  # until all five differ, and all but the last are of the train split
        last = sample_scene(rng, split, n=1)
        thing = last.things[0]
        final = {"shape": thing.shape, "colour": thing.colour, "size": thing.size, "place": thing.place}
        final |= {"ground": last.ground, "time": last.time}
        *said, unsaid = "shape", *rng.sample(["colour", "size", "place", "ground", "time"], 5)
        scene = _set(sample_scene(rng, "train", n=1), unsaid, final[unsaid])
        scenes, sentences = [], []
        for what in said:
            scene = _set(scene, what, final[what])
            word = {"place": AT, "time": WHEN}.get(what, {}).get(final[what], final[what])
            scenes.append(scene)
            sentences.append(rng.choice(_SAYS[what]).format(word, shape=thing.shape))
        if all(s.split == "train" for s in scenes[:-1]) and len({s.key for s in scenes}) == 5:
            return ToyStory(tuple(scenes), tuple(sentences))


@dataclass(frozen=True)
class ToyRound:
    """One question of a dialogue, its answer, and other answers that mean the same."""

    question: str
    answer: str
    same: tuple[str, ...]


def _round(question: str, answers: list[str], rng: random.Random) -> ToyRound:
    answer = rng.choice(answers)
    return ToyRound(question, answer, tuple(a for a in answers if a != answer))


def _yes_no(yes: bool) -> list[str]:
    return ["yes", "yes, it is", "yes, i think so"] if yes else ["no", "no, it is not", "no, i do not think so"]


def dialogue(scene: Scene, rng: random.Random, rounds: int = 10) -> tuple[str, list[ToyRound]]:
    """A short caption of a scene's first object and rounds of question and answer that tell the rest of the scene."""
    t = scene.things[0]
    it = t.shape
    asked = [
        _round(f"what colour is the {it}?", [t.colour, f"it is {t.colour}", f"{t.colour}, i think"], rng),
        _round(f"is the {it} small or big?", [t.size, f"it is {t.size}", f"quite {t.size}"], rng),
        _round(f"where is the {it}?", [AT[t.place], f"it is {AT[t.place]}", f"{AT[t.place]}, i think"], rng),
        _round("what is the ground?", [scene.ground, f"it is {scene.ground}", f"{scene.ground}, i think"], rng),
        _round("is it day or night?", [scene.time, f"it is {scene.time}", f"{scene.time}, i think"], rng),
        _round("how many objects are there?", [NUMBERS[len(scene.things)], f"i see {NUMBERS[len(scene.things)]}"], rng),
    ]
    for other in scene.things[1:]:
        asked.append(
            _round(f"what else is {AT[other.place]}?", [phrase(other, rng, 0), f"it is {phrase(other, rng, 0)}"], rng)
        )
        asked.append(
            _round(f"is the {other.shape} small or big?", [other.size, f"it is {other.size}", f"quite {other.size}"], rng)
        )
    while len(asked) < rounds:
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        if rng.random() < 0.5:
            asked.append(_round(f"is there a {shape}?", _yes_no(any(o.shape == shape for o in scene.things)), rng))
        else:
            asked.append(_round(f"is the {it} {colour}?", _yes_no(t.colour == colour), rng))
    return f"{'an' if it == 'arrow' else 'a'} {it} in a picture.", rng.sample(asked[:rounds], rounds)


def answer_pool() -> list[str]:
    """All possible answers except noun phrases, plus one noun phrase for each colour and shape."""
    words = [*COLOURS, *GROUNDS, *TIMES, *AT.values()]
    pool = [form.format(w) for w in words for form in ("{}", "it is {}", "{}, i think")]
    pool += [form.format(s) for s in SIZES for form in ("{}", "it is {}", "quite {}")]
    pool += [form.format(n) for n in NUMBERS[1:] for form in ("{}", "i see {}")]
    pool += _yes_no(True) + _yes_no(False)
    return pool + [f"{'an' if c == 'orange' else 'a'} {c} {s}" for c in COLOURS for s in SHAPES]
