"""Yes-or-no questions about the referring images: POPE's three splits, and questions about attributes, in POPE's format."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, permutations
from pathlib import Path
from typing import Any

from fromage.toy.expressions import Meaning, words
from fromage.toy.grounding import Shown
from fromage.toy.questions import yes_no
from fromage.toy.scenes import SHAPES, Scene

PAIRS = 2  # pairs of a yes and a no question about attributes per image
ASKED = 3  # objects per image that POPE asks for of those that are there, and of those that are not


def write_attributes(out: Path, shown: Sequence[Shown], rng: random.Random) -> None:
    """attributes/{split}.json: "is there a red star?", for each image as many questions to which yes is right as no.

    Not POPE, which asks for objects alone. category: what is asked beside the shape.
    """
    for split in dict.fromkeys(one.split for one in shown):
        asked = [(one, pair) for one in shown if one.split == split for pair in _pairs(one.scene, rng)]
        rows = [
            {"image": f"{one.stem}.jpg", "text": text, "label": label, "category": kind}
            for one, (yes, no, kind) in asked
            for text, label in ((yes, "yes"), (no, "no"))
        ]
        _write_lines(out / "attributes" / f"{split}.json", rows)


def _pairs(scene: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """PAIRS of questions, without repetitions."""
    found: list[tuple[str, str, str]] = []
    while len(found) < PAIRS:
        yes, no, kind = yes_no(scene, rng)
        if not any(yes == pair[0] or no == pair[1] for pair in found):
            found.append((yes, no, kind))
    return found


def write_pope(out: Path, shown: Sequence[Shown], rng: random.Random) -> None:
    """POPE of the validation images: pope/coco_pope_{random,popular,adversarial}.json, whose yes questions are the same.

    The no questions ask for shapes that are not in the image, as POPE draws them: at random; the most frequent ones in all
    images; those most often beside what is in the image. Here shapes are drawn evenly: the last two are hardly harder.
    """
    scenes = [one.scene for one in shown if one.split == "val"]
    shapes = [sorted({thing.shape for thing in scene.things}) for scene in scenes]
    frequent, beside = Counter(chain(*shapes)), Counter(chain(*(permutations(some, 2) for some in shapes)))
    there = [rng.sample(some, min(ASKED, len(some))) for some in shapes]
    absent = [[shape for shape in SHAPES if shape not in some] for some in shapes]
    drawn = {
        "random": [rng.sample(some, len(some)) for some in absent],
        "popular": [sorted(some, key=lambda shape: -frequent[shape]) for some in absent],
        "adversarial": [
            sorted(some, key=lambda shape: -sum(beside[with_, shape] for with_ in others))
            for some, others in zip(absent, shapes, strict=True)
        ],
    }
    images = [f"{one.stem}.jpg" for one in shown if one.split == "val"]
    for split, missing in drawn.items():
        asked = zip(images, there, missing, strict=True)
        pairs = [(image, *pair) for image, yes, no in asked for pair in zip(yes, no, strict=False)]
        rows = [
            {"image": image, "text": f"is there {words(Meaning(shape), 'a')}?", "label": label}
            for image, *pair in pairs
            for shape, label in zip(pair, ("yes", "no"), strict=True)
        ]
        _write_lines(out / "pope" / f"coco_pope_{split}.json", rows)


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A JSON object per line, numbered from 1, as POPE has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"question_id": n, **row}) for n, row in enumerate(rows, 1)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
