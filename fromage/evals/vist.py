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

from fromage.data.annotation_formats import read_annotations
from fromage.data.annotations import DIGITS, FILE, ID, TEXT, WHOLE, FieldType, fitting
from fromage.errors import UserError
from fromage.evals.contextual import ContextualRun, Query, RetrievalTask, Side
from fromage.evals.options import Options
from fromage.evals.report import Report
from fromage.images.regions import named
from fromage.images.transforms import Framing
from fromage.models.fromage import Fromage
from fromage.models.prompts import START
from fromage.retrieval.metrics import Scope

LENGTH = 5  # images, and sentences, of a story
NONE, ALL, FIRST, LAST = range(0), range(LENGTH), range(LENGTH - 1), range(LENGTH - 1, LENGTH)
KEPT = "_context_kept"
PHOTO = FieldType("a number or file name", lambda value: WHOLE.fits(value) or FILE.fits(value))
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
PAPER = {who: {f"{at}_authors": some for at, some in figures.items()} for who, figures in PAPER.items()}
PUBLISHED, STORIES = "val.story-in-sequence.json", range(4900, 5000)  # the published file, and how many stories it may hold
PROTOCOL = {
    "query": "</s>, sentence, image, ..., sentence, [RET], as the story was arranged",
    "images": "as the tower takes them, resized and cropped in the middle",
    "..._authors": "the released code's: </s> before every sentence; images pressed into the tower's square, whatever their "
    "shape; sentences and images in the order of the file; a right image that the story has shown before is barred too",
    "gallery": "all annotated images but the story's own before its last; in ..._context_kept with these",
    "skipped stories": "those with an image that cannot be had, and those that are not of five images",
    "clip": "all sentences as one text, cut at the length of its context (OpenAI's: 77 tokens); with images, the mean of "
    "its unit rows and theirs (our choice); in ..._authors its images, order and bar are those of the released code",
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

    The text is the one the released code uses: lower case, tokens apart. limit: stories at most, of which the images are
    all the same those of the whole file; None for all.
    Raises UserError for a file that is missing, broken or of another kind.
    """
    wanted, remedy = ("stories in sequence of VIST",), "val.story-in-sequence.json of VIST's SIS-with-labels"
    _, content = read_annotations(annotations, wanted, remedy)
    noted: dict[str, list[tuple[int, str, str]]] = {}
    for (note,) in fitting(annotations, "annotations", content["annotations"], (NOTE,)):
        line = int(note["worker_arranged_photo_order"]), note["text"], str(note["photo_flickr_id"])
        noted.setdefault(str(note["story_id"]), []).append(line)
    places = {photo: named(images, photo) for lines in noted.values() for _, _, photo in lines}
    some = list(noted.values())[:limit]
    stories = [_story(lines, places) for lines in some if len(lines) == LENGTH]
    if not stories:
        raise UserError(f"{annotations}: holds no story of {LENGTH} images; fetch the file again")
    return Stories(annotations.name, stories, list(places.values()), len(some) - len(stories))


def _story(lines: list[tuple[int, str, str]], places: dict[str, Path]) -> Story:
    """(place, sentence, photo) of each in the order of the file -> the story."""
    arranged = sorted(range(len(lines)), key=lines.__getitem__)
    sentences, photos = [lines[i][1] for i in arranged], [lines[i][2] for i in arranged]
    return Story(sentences, [places[photo] for photo in photos], tuple(map(arranged.index, range(len(lines)))))


@torch.no_grad()
def evaluate(model: Fromage, data: Stories, options: Options | None = None) -> Report:
    """R@1, 5, 10 and the median rank of the last image in every setting, of FROMAGe, CLIP and chance, in percent.

    Raises UserError for too many images lost.
    """
    run = ContextualRun(model, data.name, data.images, options, [how.framing for how in (CORRECTED, AUTHORS)])
    stories = run.keep(data.stories, lambda story: story.images)
    galleries = {how.framing: run.images(data.images, how.framing) for how in (CORRECTED, AUTHORS)}
    tasks: dict[str, RetrievalTask] = {}
    for at, setting in SETTINGS.items():
        tasks[at], tasks[at + KEPT] = story_tasks(at, setting, stories, galleries[setting.protocol.framing])
    skipped = {"stories with a lost image": len(data.stories) - len(stories), "stories of other lengths": data.other}
    sizes = {"gallery": len(run.encoded.row), "queries": len(stories)}
    paper = PAPER if data.name == PUBLISHED and len(data.stories) + data.other in STORIES else {}
    return run.report("vist", run.evaluate(tasks), sizes, skipped, PROTOCOL, paper, list(SETTINGS))


def story_tasks(name: str, setting: Setting, stories: Sequence[Story], gallery: Side) -> tuple[RetrievalTask, RetrievalTask]:
    """Find the last image of each story, without the story's own first four in the gallery, and with them."""
    how = setting.protocol
    told = [story.told(how.filed) for story in stories]
    queries = Side(name, [story_query(setting, story) for story in told], how.framing)
    shown = [gallery.numbers(story.images) for story in told]
    last = [numbers[-1:] for numbers in shown]
    return (
        RetrievalTask(queries, gallery, last, Scope([numbers[:-1] for numbers in shown], own_stays=not how.bars_own)),
        RetrievalTask(queries, gallery, last, Scope(own_stays=not how.bars_own)),
    )


def story_query(setting: Setting, story: Story) -> Query:
    """A story as FROMAGe is told it, and as CLIP, which reads all sentences as one text."""
    words = " ".join(story.sentences[i] for i in setting.sentences) if setting.sentences else None
    return Query(story_prompt(setting, story.sentences, story.images), words)


def story_prompt(setting: Setting, sentences: Sequence[str], images: Sequence[Any]) -> list[Any]:
    """Sentences and images of a story as it is told, those that the setting shows; [RET] comes after them."""
    parts: list[Any] = []
    for i in range(LENGTH):
        if i in setting.sentences:
            each = setting.protocol.start_each
            parts += [START, sentences[i]] if each else [" " + sentences[i] if parts else sentences[i]]
        if i in setting.images:
            parts.append(images[i])
    return parts
