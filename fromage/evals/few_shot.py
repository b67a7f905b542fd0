"""Learning from examples in the prompt, as a number on the toy world: captions, and answers to questions."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fromage.errors import UserError
from fromage.evals.caption_sets import read_captions
from fromage.evals.dialogues import Dialogue, read_dialogues
from fromage.evals.report import System, make_report
from fromage.generation.decoding import Decoding
from fromage.generation.generate import generate
from fromage.models.fromage import Fromage
from fromage.models.prompts import START, Part
from fromage.retrieval.encode import Options, encode_files
from fromage.toy.scenes import Scene, names_colour_and_shape

DECODING = Decoding(24, stop=(".", "\n"), max_images=0)
PROTOCOL = {
    "captioning_N": "scenes of one object whose greedy caption, behind N captioned images, names its colour and shape",
    "questions_N": "rated questions whose greedy answer, behind N answered ones with their images, people called right",
    "examples": "other validation scenes, drawn with a fixed seed; with fewer examples, the last ones of these",
}


class Shot(NamedTuple):
    """An image's features (m,), what the prompt asks behind it, and what is said then."""

    features: Tensor
    asked: str
    said: str

    def parts(self, answered: bool = True) -> list[Part]:
        """As in training: image, </s>, text."""
        return [self.features, START, *filter(None, (self.asked, self.said if answered else ""))]


@torch.no_grad()
def evaluate(model: Fromage, world: Path, shots: Sequence[int] = (0, 1, 2, 4), limit: int | None = None) -> dict[str, Any]:
    """Shares that are right, in percent, of captions and of answers behind so many examples.

    world: what `fromage toy make` wrote. limit: images of either kind at most; None for all.
    Raises UserError for another folder, and for more examples than there are.
    """
    listed = world / "coco" / "annotations" / "captions_val2017.json"
    captions = read_captions(listed, world / "coco" / "val2017")
    scenes = single_scenes(listed)
    pairs = zip(captions.images, captions.captions, strict=True)
    said = [(path, texts[0]) for path, texts in pairs if path.name in scenes][:limit]
    dense = world / "visdial" / "visdial_1.0_val_dense_annotations.json"
    talks = read_dialogues(dense.with_name("visdial_1.0_val.json"), dense, dense.parent / "images" / "val", limit).dialogues
    images = [path for path, _ in said], [talk.image for talk in talks]
    encoded = encode_files(model, [*images[0], *images[1]], Options(max_lost=0))
    captioned = [Shot(row, "", text) for row, (_, text) in zip(encoded.of(images[0]), said, strict=True)]
    asked = [question(talk, row) for row, talk in zip(encoded.of(images[1]), talks, strict=True)]
    system: System = {}
    for n in shots:
        made = complete(model, captioned, n)
        right = [names_colour_and_shape(text, scenes[path.name]) for text, path in zip(made, images[0], strict=True)]
        system[f"captioning_{n}"] = {"right": 100 * sum(right) / len(right)}
    for n in shots:
        right = [text in accepted(talk) for text, talk in zip(complete(model, asked, n), talks, strict=True)]
        system[f"questions_{n}"] = {"right": 100 * sum(right) / len(right)}
    sizes = {"captions": len(captioned), "questions": len(asked)}
    return make_report("few-shot", model, {"fromage": system}, PROTOCOL, world.name, sizes, encoded, {}, {}, ())


def complete(model: Fromage, shots: Sequence[Shot], n: int) -> list[str]:
    """What the model says at each image behind n others that are answered."""
    if not 0 <= n < len(shots):
        raise UserError(f"{n} examples in front of a question: there are 0 to {len(shots) - 1}")
    prompts = [
        [part for other in examples(i, n, len(shots)) for part in shots[other].parts()] + shot.parts(answered=False)
        for i, shot in enumerate(shots)
    ]
    return [answer.text for answer in generate(model, prompts, DECODING)]


def examples(number: int, n: int, count: int) -> list[int]:
    """n numbers below count, but for `number`, in random order: more are longer at the front."""
    others = [i for i in range(count) if i != number]
    return random.Random(number).sample(others, len(others))[:n][::-1]


def single_scenes(captions: Path) -> dict[str, Scene]:
    """File name -> scene, of the toy world's images of one object. Raises UserError for a file of real images."""
    images = json.loads(captions.read_bytes())["images"]
    found = {image["file_name"]: Scene.parse(image["scene"]) for image in images if "+" not in image.get("scene", "+")}
    if not found:
        raise UserError(f"{captions}: names no toy scene; give --world a folder of `fromage toy make`")
    return found


def question(talk: Dialogue, features: Tensor) -> Shot:
    """The rated question of a dialogue, alone."""
    rated = talk.rounds[talk.rated]
    return Shot(features, f"Q: {rated.question} A:", f" {rated.answer}.")


def accepted(talk: Dialogue) -> set[str]:
    """The candidates that at least half of the people called right."""
    candidates = talk.rounds[talk.rated].candidates
    return {text for text, relevance in zip(candidates, talk.relevance, strict=True) if relevance >= 0.5}
