"""The texts on which the toy language model is trained: tags of scenes and their meanings, stories, dialogues."""

from __future__ import annotations

import random

from fromage.toy.language import AT, WHEN, ToyRound, caption, dialogue, story
from fromage.toy.scenes import COLOURS, GROUNDS, PLACES, SHAPES, SIZES, TIMES, Scene, sample_scene

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
