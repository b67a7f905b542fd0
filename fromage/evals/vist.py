"""Visual Storytelling (VIST): which image belongs to the last sentence of a story? (section 4.1, table 1)

What a query shows of a story's five sentences and first four images is in SETTINGS; each is evaluated in two galleries:

    5_captions_4_images                        ours: </s>, sentence, image, ..., sentence, [RET]
    5_captions_4_images_authors                the released code's: see Protocol
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

from fromage.data.annotations import DIGITS, FILE, ID, TEXT, WHOLE, Kind, fitting, read_annotations
from fromage.errors import UserError
from fromage.evals.base import RetrievalRun, Retriever
from fromage.evals.report import Report, System
from fromage.images.codec import SUFFIXES
from fromage.images.transforms import Framing
from fromage.models.fromage import Fromage
from fromage.models.prompts import START, Part
from fromage.retrieval.encode import Options
from fromage.retrieval.metrics import rank_figures, ranks

LENGTH = 5  # images, and sentences, of a story
NONE, ALL, FIRST, LAST = range(0), range(LENGTH), range(LENGTH - 1), range(LENGTH - 1, LENGTH)
KEPT = "_context_kept"
PHOTO = Kind("a number or file name", lambda value: WHOLE.fits(value) or FILE.fits(value))
NOTE = {"worker_arranged_photo_order": DIGITS, "text": TEXT, "photo_flickr_id": PHOTO, "story_id": ID}  # of a sentence


class Protocol(NamedTuple):
    """How stories become queries and galleries.

    Attributes:
        start_each: whether </s> stands before every sentence, or once.
        filed: whether a story is told in the order of the file, or as its images were arranged.
        framing: how images become the tower's input.
        bars_own: whether the right image, too, is barred where the story has shown it before.
    """

    start_each: bool
    filed: bool
    framing: Framing
    bars_own: bool


CORRECTED = Protocol(start_each=False, filed=False, framing="own", bars_own=False)
AUTHORS = Protocol(start_each=True, filed=True, framing="square", bars_own=True)


class Setting(NamedTuple):
    """What a query shows of a story, by which protocol."""

    sentences: range
    images: range
    protocol: Protocol = CORRECTED


SETTINGS = {
    "1_caption": Setting(LAST, NONE),
    "5_captions": Setting(ALL, NONE),
    "5_captions_4_images": Setting(ALL, FIRST),
    "4_images": Setting(NONE, FIRST),
    "1_caption_authors": Setting(LAST, NONE, AUTHORS),
    "5_captions_authors": Setting(ALL, NONE, AUTHORS),
    "5_captions_4_images_authors": Setting(ALL, FIRST, AUTHORS),
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
PAPER = {who: {at: figures.get(at.removesuffix("_authors"), {}) for at in SETTINGS} for who, figures in PAPER.items()}
PROTOCOL = {
    "query": "</s>, sentence, image, ..., sentence, [RET], as the story was arranged",
    "images": "as the tower takes them, resized and cropped in the middle",
    "..._authors": "the released code's: </s> before every sentence; images pressed into the tower's square, whatever their "
    "shape; sentences and images in the order of the file; a right image that the story has shown before is barred too",
    "gallery": "all annotated images but the story's own before its last; in ..._context_kept with these",
    "skipped stories": "those with an image that cannot be had, and those that are not of five images",
    "clip": "all sentences as one text, cut at 77 tokens; with images, the mean of its unit rows and theirs (our choice); "
    "in ..._authors its images, order and bar are those of the released code",
    "ranks": "exact; ties count against the model",
}


@dataclass(frozen=True)
class Story:
    """Five sentences and the five images they were written for, as these were arranged.

    Attributes:
        filed: numbers of the five in the order of the file.
    """

    sentences: list[str]
    images: list[Path]
    filed: tuple[int, ...] = tuple(ALL)

    def told(self, filed: bool) -> Story:
        """The story as it was arranged, or in the order of the file."""
        order = self.filed if filed else ALL
        return Story([self.sentences[i] for i in order], [self.images[i] for i in order])


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
    stories = [_story(lines, places) for lines in some.values() if len(lines) == LENGTH]
    if not stories:
        raise UserError(f"{annotations}: holds no story of {LENGTH} images; fetch the file anew")
    return Stories(annotations.name, stories, list(places.values()), len(some) - len(stories))


def _story(lines: list[tuple[int, str, str]], places: dict[str, Path]) -> Story:
    """(place, sentence, photo) of each in the order of the file -> the story."""
    arranged = sorted(range(len(lines)), key=lines.__getitem__)
    sentences, photos = [lines[i][1] for i in arranged], [lines[i][2] for i in arranged]
    return Story(sentences, [places[photo] for photo in photos], tuple(map(arranged.index, range(len(lines)))))


def _place(images: Path, photo: str) -> Path:
    paths = [images / f"{photo}.{suffix}" for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])


@torch.no_grad()
def evaluate(model: Fromage, data: Stories, options: Options | None = None) -> Report:
    """R@1, 5, 10 and the median rank of the last image in every setting, of FROMAGe, CLIP and chance, in percent.

    Raises UserError for too many images lost.
    """
    run = RetrievalRun(model, data.name, data.images, options, [how.framing for how in (CORRECTED, AUTHORS)])
    stories = run.keep(data.stories, lambda story: story.images)
    views = run.encoded.views  # (M, m) each

    def recalls(system: Retriever) -> System:
        galleries = {framing: system.embed_images(features) for framing, features in views.items()}  # (M, e) each
        figures: System = {}
        for at, setting in SETTINGS.items():
            how = setting.protocol
            told = [story.told(how.filed) for story in stories]
            numbers = [[run.encoded.row[path] for path in story.images] for story in told]
            rows, gallery = torch.tensor(numbers, device=model.device), galleries[how.framing]  # (S, 5), (M, e)
            if system.name == "clip":
                queries = clip_queries(system, at, told, gallery[rows])  # (S, e)
            else:
                queries = prompt_queries(system, at, told, views[how.framing][rows])  # (S, e)
            for name, excluded in ((at, rows[:, :-1]), (at + KEPT, None)):
                rank = ranks(queries, gallery, rows[:, -1], excluded=excluded, own_stays=not how.bars_own)  # (S,)
                figures[name] = rank_figures(rank)
        return figures

    shown = len(run.encoded.row)
    figures = run.compare(recalls, lambda setting: (shown if setting.endswith(KEPT) else shown - LENGTH + 1, 1))
    skipped = {"stories with a lost image": len(data.stories) - len(stories), "stories of other lengths": data.other}
    sizes = {"gallery": shown, "queries": len(stories)}
    return run.report("vist", figures, sizes, skipped, PROTOCOL, PAPER, list(SETTINGS))


def story_prompt(setting: Setting, sentences: Sequence[str], images: Sequence[Any]) -> list[Part]:
    """Sentences and images of a story as it is told, those that the setting shows; [RET] comes behind them."""
    parts: list[Part] = []
    for i in range(LENGTH):
        if i in setting.sentences:
            each = setting.protocol.start_each
            parts += [START, sentences[i]] if each else [" " + sentences[i] if parts else sentences[i]]
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
