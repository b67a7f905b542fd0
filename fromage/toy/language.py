"""Text about scenes: captions, tags, stories, dialogues, and the training texts of the LM."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from fromage.toy.scenes import COLOURS, GROUNDS, PLACES, SHAPES, SIZES, TIMES, Scene, Thing, sample_scene

AT = {place: f"at the {place}" for place in PLACES}
WHEN = {"day": "by day", "night": "at night"}
NUMBERS = ("zero", "one", "two", "three")
EOS = "</s>"


def tag_words() -> list[str]:
    """All tags of the world. A tag is one word for two attributes, as natural words often are."""
    tags = [c + s for c in COLOURS for s in SHAPES] + [z + s for z in SIZES for s in SHAPES]
    return tags + [p + s for p in PLACES for s in SHAPES] + [t + g for t in TIMES for g in GROUNDS]


def tags(scene: Scene, rng: random.Random) -> list[str]:
    """A scene's tags in random order: 'redstar', 'smallstar', 'leftstar' for each object, 'nightsand' for the ground."""
    words = [scene.time + scene.ground]
    for t in scene.things:
        words += [t.colour + t.shape, t.size + t.shape, t.place + t.shape]
    return rng.sample(words, len(words))


def attributes(scene: Scene, rng: random.Random) -> list[str]:
    """The plain words of a scene of one object, in random order."""
    t = scene.things[0]
    words = [t.shape, t.colour, t.size, t.place, scene.ground, scene.time]
    return rng.sample(words, len(words))


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


def question_text(rounds: list[ToyRound]) -> str:
    """Rounds in the paper's prompt format: 'Q: ... A: ...'."""
    return " ".join(f"Q: {r.question} A: {r.answer}." for r in rounds)


def _glossary(rng: random.Random) -> str:
    """What single tags mean, in a row: 'redstar: a red star. a small moon: smallmoon.'"""
    lines = []
    for _ in range(5):
        thing, kind = sample_scene(rng, "train", n=1), rng.randrange(7)
        t = thing.things[0]
        if kind < 3:
            tag, means = t.colour + t.shape, f"{'an' if t.colour == 'orange' else 'a'} {t.colour} {t.shape}"
        elif kind < 5:
            tag, means = t.place + t.shape, f"{'an' if t.shape == 'arrow' else 'a'} {t.shape} {AT[t.place]}"
        elif kind < 6:
            tag, means = t.size + t.shape, f"a {t.size} {t.shape}"
        else:
            tag, means = thing.time + thing.ground, f"on the {thing.ground} {WHEN[thing.time]}"
        lines.append(f"{tag}: {means}." if rng.random() < 0.6 else f"{means}: {tag}.")
    return " ".join(lines)


def _some(words: list[str], rng: random.Random, share: float = 0.7) -> list[str]:
    return [w for w in words if rng.random() < share] or words[:1]


def _recap(scene: Scene, rng: random.Random) -> str:
    """The whole scene after 'so:', as tags in random order or as a caption."""
    return "so: " + (" ".join(tags(scene, rng)) if rng.random() < 0.6 else caption(scene, rng, 1.0))


def _story_document(rng: random.Random, split: str) -> str:
    """A story and its recap. Two of three stories have tags after the sentences, where a prompt has images; half of all
    have </s> before the tags, as before captions."""
    tale, seen, between = story(rng, split), rng.random() < 0.67, rng.choice((" ", EOS))
    shown = [_some(tags(scene, rng), rng) if seen else [] for scene in tale.scenes[:-1]] + [[]]
    parts = [" ".join([sentence, *words]) for sentence, words in zip(tale.sentences, shown, strict=True)]
    return f"{between.join(parts)} {_recap(tale.scenes[-1], rng)}"


def _dialogue_document(rng: random.Random, split: str) -> str:
    """A dialogue, with the scene's tags and </s> before it, or with a recap after it."""
    scene = sample_scene(rng, split)
    short, rounds = dialogue(scene, rng, rng.randint(2, 10))
    if rng.random() < 0.3:
        return f"{' '.join(tags(scene, rng))}{EOS}{short} {question_text(rounds)}"
    return f"{short} {question_text(rounds)} {_recap(scene, rng)}"


SHARES = (26, 13, 8, 24, 15, 7, 7)  # percentages of the kinds of document
FIRST_SHARES = (3, 3, 24, 15, 5, 25, 25)  # in the first phase, more of what is learned fast: meanings of tags, and copying


def _unfolded(scene: Scene, rng: random.Random) -> str:
    """Tags, </s>, and their meaning, in the order of image prefix and caption in training."""
    return " ".join(_some(tags(scene, rng), rng, rng.choice((0.6, 1.0)))) + EOS + caption(scene, rng)


def document(rng: random.Random, split: str = "train", shares: tuple[int, ...] = SHARES) -> str:
    """One text for the language model, without the </s> in front. Kinds, in the order below:

    a story or a dialogue with its recap; a glossary; tags unfolded, of one scene or of up to five in a row, as examples
    stand in a prompt; a caption and its tags in random order (folding: the position before them must hold the whole
    scene); plain words unfolded; paraphrases in a row.
    """
    kind = rng.choices(range(7), shares)[0]
    if kind < 2:
        return (_story_document, _dialogue_document)[kind](rng, split)
    if kind == 2:
        return _glossary(rng)
    scene = sample_scene(rng, split, n=1 if kind == 5 else None)
    if kind == 3:
        others = [sample_scene(rng, split, n=1) for _ in range(rng.choice((0, 0, 1, 2, 4)))]
        return " ".join(_unfolded(shown, rng) for shown in (*others, scene))
    if kind == 4:
        return f"{caption(scene, rng)} so: " + " ".join(tags(scene, rng))
    if kind == 5:
        return " ".join(attributes(scene, rng)) + EOS + caption(scene, rng)
    return " ".join(caption(scene, rng, rng.choice((0.5, 0.9))) for _ in range(3))
