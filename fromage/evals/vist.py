"""Visual Storytelling (VIST): which image belongs to the last sentence of a story? (section 4.1, table 1)

What a query shows of a story's five sentences and first four images is in SETTINGS; each is evaluated in two galleries:

    5_captions_4_images                        ours: </s>, sentence, image, ..., sentence, [RET]
    5_captions_4_images_authors                the released code's: </s> before every sentence
    ..._context_kept                           the gallery with the story's own first four images, which are left out else
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fromage.data.annotations import DIGITS, ID, TEXT, fitting, read_annotations
from fromage.errors import UserError
from fromage.evals.base import RetrievalRun, Retriever
from fromage.evals.report import Report, System
from fromage.images.codec import SUFFIXES
from fromage.models.fromage import Fromage
from fromage.models.prompts import START, Part
from fromage.retrieval.encode import Options
from fromage.retrieval.metrics import rank_figures, ranks

LENGTH = 5  # images, and sentences, of a story
NONE, ALL, FIRST, LAST = range(0), range(LENGTH), range(LENGTH - 1), range(LENGTH - 1, LENGTH)
KEPT = "_context_kept"
NOTE = {"worker_arranged_photo_order": DIGITS, "text": TEXT, "photo_flickr_id": ID, "story_id": ID}  # of a sentence


class Setting(NamedTuple):
    """What a query shows of a story; authors: with </s> before every sentence, as the released code has it."""

    sentences: range
    images: range
    authors: bool = False


SETTINGS = {
    "1_caption": Setting(LAST, NONE),
    "5_captions": Setting(ALL, NONE),
    "5_captions_4_images": Setting(ALL, FIRST),
    "4_images": Setting(NONE, FIRST),
    "5_captions_authors": Setting(ALL, NONE, authors=True),
    "5_captions_4_images_authors": Setting(ALL, FIRST, authors=True),
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
PAPER["fromage"] = {at: PAPER["fromage"].get(at.removesuffix("_authors"), {}) for at in SETTINGS}
PROTOCOL = {
    "query": "</s>, sentence, image, ..., sentence, [RET]",
    "..._authors": "with </s> before every sentence, as the released code has it",
    "gallery": "all annotated images but the story's own before its last; in ..._context_kept with these",
    "skipped stories": "those with an image that cannot be had, and those that are not of five images",
    "clip": "all sentences as one text, cut at 77 tokens; with images, the mean of its unit rows and theirs (our choice)",
    "ranks": "exact; ties count against the model",
}


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
    noted: dict[str, list[tuple[int, str, str]]] = {}
    for (note,) in fitting(annotations, "annotations", content["annotations"], (NOTE,)):
        line = int(note["worker_arranged_photo_order"]), note["text"], str(note["photo_flickr_id"])
        noted.setdefault(str(note["story_id"]), []).append(line)
    some = dict(list(noted.items())[:limit])
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
def evaluate(model: Fromage, data: Stories, options: Options | None = None) -> Report:
    """R@1, 5, 10 and the median rank of the last image in every setting, of FROMAGe, CLIP and chance, in percent.

    Raises UserError for a vision tower without text tower, and for too many images lost.
    """
    run = RetrievalRun(model, data.name, data.images, options)
    stories = run.keep(data.stories, lambda story: story.images)
    features = run.encoded.features  # (M, m)
    numbers = [[run.encoded.row[path] for path in story.images] for story in stories]
    rows = torch.tensor(numbers, device=model.device)  # (S, 5)

    def recalls(system: Retriever) -> System:
        gallery = system.embed_images(features)  # (M, e)
        if system.name == "clip":
            embedded = {at: clip_queries(system, at, stories, gallery[rows]) for at in SETTINGS if not SETTINGS[at].authors}
        else:
            embedded = {at: prompt_queries(system, at, stories, features[rows]) for at in SETTINGS}
        figures: System = {}
        for at, queries in embedded.items():
            for name, excluded in ((at, rows[:, :-1]), (at + KEPT, None)):
                figures[name] = rank_figures(ranks(queries, gallery, rows[:, -1], excluded=excluded))
        return figures

    shown = len(features)
    figures = run.compare(recalls, lambda setting: (shown if setting.endswith(KEPT) else shown - LENGTH + 1, 1))
    skipped = {"stories with a lost image": len(data.stories) - len(stories), "stories of other lengths": data.other}
    sizes = {"gallery": shown, "queries": len(stories)}
    return run.report("vist", figures, sizes, skipped, PROTOCOL, PAPER, list(SETTINGS))


def story_prompt(setting: Setting, sentences: Sequence[str], images: Sequence[Any]) -> list[Part]:
    """Sentences and images of a story in order, those that the setting shows; [RET] comes behind them."""
    parts: list[Part] = []
    for i in range(LENGTH):
        if i in setting.sentences:
            parts += [START, sentences[i]] if setting.authors else [" " + sentences[i] if parts else sentences[i]]
        if i in setting.images:
            parts.append(images[i])
    return parts


def prompt_queries(fromage: Retriever, name: str, stories: Sequence[Story], features: Tensor) -> Tensor:
    """FROMAGe's queries: (S, q) unit rows; features (S, 5, m)."""
    shown = zip(stories, features, strict=True)
    return fromage.embed_text([story_prompt(SETTINGS[name], story.sentences, images) for story, images in shown], name)


def clip_queries(clip: Retriever, name: str, stories: Sequence[Story], images: Tensor) -> Tensor:
    """CLIP's queries: (S, e) unit rows, the mean of the sentences' row and the images'; images (S, 5, e) unit rows."""
    setting = SETTINGS[name]
    rows = list(images[:, list(setting.images)].unbind(1))  # (S, e) each
    if setting.sentences:
        texts = [" ".join(story.sentences[i] for i in setting.sentences) for story in stories]
        rows.append(clip.embed_text(texts, name))
    return F.normalize(torch.stack(rows).mean(0), dim=-1)  # (n, S, e) -> (S, e)
