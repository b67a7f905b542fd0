"""Visual Storytelling: which image belongs to the last sentence of a story? (section 4.1, table 1)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fromage.data.annotations import malformed, read_annotations
from fromage.errors import UserError
from fromage.evals.clip import load_clip_baseline
from fromage.evals.report import System, make_report
from fromage.images.codec import SUFFIXES
from fromage.models.fromage import Fromage
from fromage.models.prompts import START, Part
from fromage.models.vision.base import TextTower
from fromage.retrieval.encode import Options, encode_files, in_batches
from fromage.retrieval.metrics import chance, rank_figures, ranks

LENGTH = 5  # images, and sentences, of a story
SETTINGS: dict[str, tuple[range, range]] = {  # which sentences and which images are shown
    "1_caption": (range(4, 5), range(0)),
    "5_captions": (range(5), range(0)),
    "5_captions_4_images": (range(5), range(4)),
    "4_images": (range(0), range(4)),
}
KEPT, AUTHORS = "_context_kept", "_authors"
PROTOCOL = {
    "query": "</s>, sentence, image, ..., sentence, [RET]",
    "..._authors": "with </s> before every sentence, as the released code has it",
    "gallery": "all annotated images but the story's own before its last; in ..._context_kept with these",
    "skipped stories": "those with an image that cannot be had, and those that are not of five images",
    "clip": "all sentences as one text, cut at 77 tokens; with images, the mean of its unit rows and theirs (our choice)",
    "ranks": "exact; ties count against the model",
}
PAPER = {
    "fromage": {
        "1_caption": {"r1": 11.3, "r5": 24.6, "r10": 32.1},
        "5_captions": {"r1": 10.8, "r5": 23.8, "r10": 31.7},
        "5_captions_4_images": {"r1": 18.2, "r5": 42.7, "r10": 51.8},
    },
    "clip": {
        "1_caption": {"r1": 11.9, "r5": 25.5, "r10": 32.2},
        "5_captions": {"r1": 5.9, "r5": 19.5, "r10": 28.0},
        "5_captions_4_images": {"r1": 2.4, "r5": 21.3, "r10": 34.0},
    },
}
PROTOCOLS = {at: (at, False) for at in SETTINGS} | {at + AUTHORS: (at, True) for at in ("5_captions", "5_captions_4_images")}


@dataclass(frozen=True)
class Story:
    """Five sentences and the five images they were written for, in order."""

    sentences: list[str]
    images: list[Path]


@dataclass(frozen=True)
class Stories:
    """The stories of a file, and every image that it annotates.

    Attributes:
        other: stories that are not of five images, which are left out.
    """

    name: str
    stories: list[Story]
    images: list[Path]
    other: int


def read_stories(annotations: Path, images: Path, limit: int | None = None) -> Stories:
    """Stories in sequence (SIS) as VIST publishes them, their images as images/NUMBER.jpg (.png, .gif ...).

    The text is the one the released code uses: lower case, tokens apart. limit: stories at most; None for all.
    Raises UserError for a file that is missing, broken or of another kind.
    """
    wanted, remedy = ("stories in sequence of VIST",), "val.story-in-sequence.json of VIST's SIS-with-labels"
    _, content = read_annotations(annotations, wanted, remedy)
    told: dict[str, list[tuple[int, str, str]]] = {}
    try:
        for (note,) in content["annotations"]:
            line = int(note["worker_arranged_photo_order"]), note["text"], note["photo_flickr_id"]
            told.setdefault(note["story_id"], []).append(line)
    except (KeyError, TypeError, ValueError) as error:
        raise malformed(annotations, error) from error
    some = dict(list(told.items())[:limit])
    places = {photo: _place(images, photo) for lines in some.values() for _, _, photo in lines}
    stories = [
        Story([text for _, text, _ in lines], [places[photo] for _, _, photo in lines])
        for lines in map(sorted, some.values())
        if len(lines) == LENGTH
    ]
    if not stories:
        raise UserError(f"{annotations}: holds no story of {LENGTH} images; fetch the file anew")
    return Stories(annotations.name, stories, list(places.values()), len(some) - len(stories))


def _place(images: Path, photo: str) -> Path:
    paths = [images / f"{photo}.{suffix}" for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])


@torch.no_grad()
def evaluate(model: Fromage, data: Stories, options: Options | None = None) -> dict[str, Any]:
    """Recalls of the last image in every setting, of FROMAGe, of its CLIP and of chance.

    Raises UserError for too many images lost.
    """
    options = options or Options()
    encoded = encode_files(model, data.images, options)
    stories = [story for story in data.stories if all(path in encoded.row for path in story.images)]
    if not stories:
        raise UserError(f"{data.name}: no story has all its images; name the right --images")
    rows = torch.tensor([[encoded.row[p] for p in story.images] for story in stories], device=model.device)  # (S, 5)

    def judged(embedded: dict[str, Tensor], gallery: Tensor) -> System:
        """Ranks of the last images by (S, e) queries of each setting in the gallery (M, e)."""
        system: System = {}
        for setting, queries in embedded.items():
            for name, excluded in ((setting, rows[:, :-1]), (setting + KEPT, None)):
                system[name] = rank_figures(ranks(queries, gallery, rows[:, -1], excluded=excluded))
        return system

    own = {name: _queries(model, name, stories, encoded.features[rows], options) for name in PROTOCOLS}
    systems = {"fromage": judged(own, model.embed_images(encoded.features))}
    if options.clip:
        clip = load_clip_baseline(model)
        gallery = clip.embed_features(encoded.features)  # (M, e)
        systems["clip"] = judged({at: _clip_queries(clip, at, stories, gallery[rows], options) for at in SETTINGS}, gallery)
    shown = len(encoded.row)
    systems["chance"] = {at: chance(shown if at.endswith(KEPT) else shown - LENGTH + 1) for at in systems["fromage"]}
    sizes = {"gallery": shown, "queries": len(stories)}
    paper = PAPER | {"fromage": {name: PAPER["fromage"].get(at, {}) for name, (at, _) in PROTOCOLS.items()}}
    skipped = {"stories with a lost image": len(data.stories) - len(stories), "stories of other lengths": data.other}
    return make_report("vist", model, systems, PROTOCOL, data.name, sizes, encoded, skipped, paper, list(PROTOCOLS))


def story_prompt(protocol: str, sentences: Sequence[str], images: Sequence[Any]) -> list[Part]:
    """Sentences and images of a story in order, those that the setting shows."""
    setting, authors = PROTOCOLS[protocol]
    said, shown = SETTINGS[setting]
    parts: list[Part] = []
    for i in range(LENGTH):
        sentence: list[Part] = [START, sentences[i]] if authors else [" " + sentences[i] if parts else sentences[i]]
        parts += sentence if i in said else []
        parts += [images[i]] if i in shown else []
    return parts


def _queries(model: Fromage, protocol: str, stories: Sequence[Story], features: Tensor, options: Options) -> Tensor:
    """(S, q) unit rows; features (S, 5, m)."""
    prompts = [story_prompt(protocol, story.sentences, own) for story, own in zip(stories, features, strict=True)]
    embed = partial(model.embed_text, batch_size=options.batch_size)
    return in_batches(embed, prompts, options.batch_size, protocol)


def _clip_queries(clip: TextTower, setting: str, stories: Sequence[Story], images: Tensor, options: Options) -> Tensor:
    """(S, e) unit rows; images (S, 5, e) unit rows."""
    said, shown = SETTINGS[setting]
    rows = list(images[:, list(shown)].unbind(1))  # (S, e) each
    if said:
        texts = [" ".join(story.sentences[i] for i in said) for story in stories]
        rows.append(in_batches(clip.embed_text, texts, options.batch_size, f"{setting}, CLIP"))
    return F.normalize(torch.stack(rows).mean(0), dim=-1)
