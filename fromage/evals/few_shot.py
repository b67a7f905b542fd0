"""Learning from examples in the prompt, on the toy world: captions, and answers to questions (cf. section 4.3).

Protocol: N images with captions, or with a question and its answer, then an image left open, which the model completes
greedily. The figure is the share of completions that are right, for each N.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fromage.data.annotation_formats import read_annotations
from fromage.data.annotations import FILE, FieldType, fitting, optional
from fromage.errors import UserError
from fromage.evals.base import EvaluationRun
from fromage.evals.caption_sets import read_caption_set
from fromage.evals.dialogues import Dialogue, read_dialogues
from fromage.evals.options import Options
from fromage.evals.report import Report, System
from fromage.generation.generate import generate
from fromage.generation.options import Decoding
from fromage.models.fromage import Fromage
from fromage.models.prompts import Part
from fromage.toy.scenes import Scene, names_colour_and_shape

DECODING = Decoding(24, stop=(".", "\n"), max_images=0)
PROTOCOL = {
    "captioning_N": "scenes of one object whose greedy caption, after N captioned images, names its colour and shape",
    "questions_N": "rated questions whose greedy answer, after N answered ones with their images, people called right",
    "examples": "other validation scenes, drawn with a fixed seed; with fewer examples, the last ones of these",
}


class Shot(NamedTuple):
    """An image, the prompt after it, the text that follows, and whether a completion is right."""

    image: Path
    prompt: str
    text: str
    accepts: Callable[[str], bool]


@dataclass(frozen=True)
class ToyWorld:
    """Shots to caption and to answer, from the validation data of a toy world."""

    name: str
    captions: list[Shot]
    questions: list[Shot]


def _is_scene(key: Any) -> bool:
    try:
        return isinstance(key, str) and bool(Scene.parse(key))
    except ValueError:
        return False


SCENE = FieldType("a toy scene", _is_scene)


def read_world(world: Path, limit: int | None = None) -> ToyWorld:
    """The captions and questions of what `fromage toy make` wrote. limit: of either kind at most; None for all.

    Raises UserError for another folder.
    """
    listed = world / "coco" / "annotations" / "captions_val2017.json"
    data = read_caption_set(listed, world / "coco" / "val2017")
    scenes = single_scenes(listed)
    pairs = [(path, texts[0]) for path, texts in zip(data.images, data.captions, strict=True) if path.name in scenes]
    captions = [Shot(path, "", text, partial(names_colour_and_shape, scene=scenes[path.name])) for path, text in pairs]
    dense = world / "visdial" / "visdial_1.0_val_dense_annotations.json"
    dialogues = read_dialogues(dense.with_name("visdial_1.0_val.json"), dense, dense.parent / "images" / "val", limit)
    return ToyWorld(world.name, captions[:limit], [question(dialogue) for dialogue in dialogues.dialogues])


def single_scenes(captions: Path) -> dict[str, Scene]:
    """File name -> scene, of the toy world's images of one object. Raises UserError for a file of real images."""
    _, content = read_annotations(captions, ("captions of COCO",), "a folder of `fromage toy make`")
    images = fitting(captions, "images", content["images"], {"file_name": FILE, "scene": optional(SCENE)})
    scenes = {image["file_name"]: image.get("scene") or "+" for image in images}
    found = {name: Scene.parse(key) for name, key in scenes.items() if "+" not in key}
    if not found:
        raise UserError(f"{captions}: names no toy scene; give --world a folder of `fromage toy make`")
    return found


def question(dialogue: Dialogue) -> Shot:
    """The rated question of a dialogue, alone. Right is a candidate that at least half of the people called right."""
    rated = dialogue.rounds[dialogue.rated]
    right = {text for text, relevance in zip(rated.candidates, dialogue.relevance, strict=True) if relevance >= 0.5}
    return Shot(dialogue.image, f"Q: {rated.question} A:", f" {rated.answer}.", right.__contains__)


@torch.no_grad()
def evaluate(model: Fromage, data: ToyWorld, options: Options | None = None, shots: Sequence[int] = (0, 1, 2, 4)) -> Report:
    """Shares of captions and answers that are right, in percent, after each number of examples in shots.

    Raises UserError for too many images lost, and for more examples than there are.
    """
    run = EvaluationRun(model, data.name, [shot.image for shot in (*data.captions, *data.questions)], options)
    captions, questions = (run.keep(some, lambda shot: [shot.image]) for some in (data.captions, data.questions))
    system: System = {}
    for task, listed in (("captioning", captions), ("questions", questions)):
        features = run.encoded.of([shot.image for shot in listed])  # (S, m)
        for n in shots:
            made = complete(model, listed, features, n, run.options.batch_size)
            right = [shot.accepts(text) for shot, text in zip(listed, made, strict=True)]
            system[f"{task}_{n}"] = {"right": 100 * sum(right) / len(right)}
    sizes = {"captions": len(captions), "questions": len(questions)}
    return run.report("few-shot", {"fromage": system}, sizes, {}, PROTOCOL)


def complete(model: Fromage, shots: Sequence[Shot], features: Tensor, n: int, batch_size: int = 64) -> list[str]:
    """The model's text at each image after n others with theirs; features (S, m) of the S images."""
    if not 0 <= n < len(shots):
        raise UserError(f"{n} examples in front of a question: there are 0 to {len(shots) - 1}")

    def parts(number: int, answered: bool) -> list[Part]:
        shot = shots[number]
        return [features[number], *filter(None, (shot.prompt, shot.text if answered else ""))]

    prompts = [
        [part for other in examples(i, n, len(shots)) for part in parts(other, True)] + parts(i, False)
        for i in range(len(shots))
    ]
    return [answer.text for answer in generate(model, prompts, DECODING, batch_size=batch_size)]


def examples(number: int, n: int, count: int) -> list[int]:
    """n numbers below count, but for `number`, in random order: more are longer at the front."""
    others = [i for i in range(count) if i != number]
    return random.Random(number).sample(others, len(others))[:n][::-1]
