"""Composed retrieval: an image and words that say what is to differ find another image. What its benchmarks share.

Settings, of every benchmark and kind of gallery:

    NAME           FROMAGe reads the image and the words, as in training on tuples: image, </s>, words, [RET]
    NAME_asked     it reads MCL's prompt: image, </s>, 'Q:words.', a new line, 'A:it becomes a photo of', [RET]

Beside it stand CLIP's image alone, its text alone and their sum, and the rows that MCL (Li et al., ICML 2024) published.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fromage.data.annotations import TEXT, FieldType
from fromage.errors import UserError
from fromage.evals.contextual import RANKS, ContextualRun, Measure, Query, RetrievalTask, Side
from fromage.evals.options import Options
from fromage.evals.report import Report, System
from fromage.images.regions import Place
from fromage.io import check_new, write_files
from fromage.models.fromage import Fromage
from fromage.retrieval.metrics import WHOLE, Scope

ASKED = "_asked"
PROMPTS = {"": "{}", ASKED: "Q:{}.\nA:it becomes a photo of"}  # as MCL's released evaluation has it
WORDS = FieldType("a text that is not empty", lambda value: TEXT.fits(value) and bool(value.strip()))
PROTOCOL = {
    "query": "the image, </s>, the words, [RET]",
    "..." + ASKED: "the words within MCL's prompt: 'Q:words.', a new line, 'A:it becomes a photo of'",
    "images": "as the tower takes them, resized and cropped in the middle, where MCL's published rows have the query's "
    "image pressed into the tower's square; words as the file has them, where MCL has CIRR's in lower case",
    "clip": "the mean of the unit rows of image and words; 'clip image' and 'clip text' have one of them alone",
    "ranks": "exact; ties count against the model",
}


@dataclass(frozen=True)
class Composed:
    """A query: an image, words, and the images that are meant.

    Attributes:
        key: its name in the files of the benchmark.
        right: the images that are meant; none in a test split.
        members: the images of its own small gallery, where the benchmark has one.
    """

    key: str
    reference: Place
    words: str
    right: tuple[Place, ...] = ()
    members: tuple[Place, ...] = ()


@dataclass(frozen=True)
class ComposedSet:
    """The queries of a file, and the images that they search.

    Attributes:
        names: what files for the benchmark's server call an image.
        published: whether these are the data of the published figures, whole.
        stored: queries that the file holds.
    """

    name: str
    queries: list[Composed]
    gallery: list[Place]
    names: Mapping[Place, Any] = field(default_factory=dict)
    published: bool = False
    stored: int = 0

    @property
    def is_test(self) -> bool:
        """Whether the server alone knows what is right."""
        return not any(query.right for query in self.queries)

    def check(self, server_files: Path | None) -> None:
        """Raise UserError where right answers are missing and the server gets no files, or these would lack queries."""
        if self.is_test and server_files is None:
            raise UserError(
                f"{self.name}: a test split, without right answers; name a folder for its server: --server-files"
            )
        if not self.is_test and (lacking := sum(not query.right for query in self.queries)):
            raise UserError(f"{self.name}: {lacking} queries have no right image; fetch the file again")
        if server_files is not None:
            self.check_whole(len(self.queries))

    def check_whole(self, count: int) -> None:
        """Raise UserError where only so many of the queries can be answered: a server takes a file of all of them."""
        if count < self.stored:
            told = f"{self.name}: the server's file wants all {self.stored} queries, of which {count} can be answered"
            raise UserError(f"{told}; leave out --limit, and see that no query is odd and no image missing")


class ComposedQueries:
    """Queries of a set whose images were encoded, and the gallery that they search.

    Attributes:
        own: for each query its own image, as numbers of the gallery.
        members: for each query the items of its own small gallery.
    """

    def __init__(self, data: ComposedSet, queries: Sequence[Composed], gallery: Side) -> None:
        self.data, self.queries, self.gallery = data, queries, gallery
        self.own = [gallery.numbers([query.reference]) for query in queries]
        self.members = [gallery.numbers(query.members) for query in queries]
        self._right = [gallery.numbers(query.right) for query in queries]
        self._sides = {
            ending: Side(data.name + ending, [_asked(query, form) for query in queries]) for ending, form in PROMPTS.items()
        }

    def tasks(self, name: str, scope: Scope = WHOLE, measure: Measure = RANKS) -> dict[str, RetrievalTask]:
        """A task for each prompt; CLIP has no prompt, and so the first alone."""
        return {
            name + ending: RetrievalTask(side, self.gallery, self._right, scope, measure, only="fromage" if ending else None)
            for ending, side in self._sides.items()
        }

    def answers(self, run: ContextualRun, task: RetrievalTask, k: int) -> dict[str, list[Any]]:
        """The k images that FROMAGe finds for each query, by the benchmark's names."""
        found = [[self.data.names[task.gallery.items[i]] for i in items] for items in run.best(task, k)]  # type: ignore[index]
        return {query.key: items for query, items in zip(self.queries, found, strict=True)}


def _asked(query: Composed, form: str) -> Query:
    """A query in the form of a prompt; without words, as one of CIRR's, the plain form is its image alone."""
    text = form.format(query.words if form == PROMPTS[""] else query.words.strip().rstrip("."))
    return Query([query.reference, *([text] if text.strip() else [])], query.words)


class ComposedRun(ContextualRun):
    """A run of sets of composed queries, each with a gallery of its own; CLIP's image and text are systems too.

    Attributes:
        parts: one for each set, in order.
    """

    def __init__(self, model: Fromage, name: str, sets: Sequence[ComposedSet], options: Options | None) -> None:
        """Raises UserError for too many images lost."""
        images = [image for some in sets for image in some.gallery]
        images += [image for some in sets for query in some.queries for image in (query.reference, *query.members)]
        super().__init__(model, name, images, options)
        self.set_apart()
        self.sets = sets
        self.parts = [
            ComposedQueries(
                some,
                self.keep(some.queries, lambda query: [query.reference, *query.right, *query.members]),
                self.images(some.gallery),
            )
            for some in sets
        ]

    def told_of(
        self,
        name: str,
        figures: Mapping[str, System],
        protocol: Mapping[str, str],
        paper: Mapping[str, System],
        published: str,
        headline: Sequence[str],
    ) -> Report:
        """The report; paper: rows that were published, shown where the sets are whole and theirs, as `published` says."""
        kept, count = sum(len(part.queries) for part in self.parts), sum(len(some.queries) for some in self.sets)
        whole = all(some.published for some in self.sets) and kept == count and not self.encoded.lost
        sizes = {"gallery": sum(len(part.gallery.items) for part in self.parts), "queries": kept}
        skipped = {"queries with a lost image": count - kept}
        form = {"query": "</s>, the image, the words, [RET]"} if self.model.start_first else {}
        rows = published if whole else f"none on these data; {published}"
        protocol = {**PROTOCOL, **form, **protocol, "published rows": rows}
        return self.report(
            name, figures, sizes, skipped, protocol, paper if whole else {}, headline if figures or whole else []
        )


def write_server_files(folder: Path, files: Mapping[str, Any], overwrite: bool = False) -> str:
    """Write JSON files by name; returns what to tell of it.

    Raises UserError for those that are there already, unless they may be replaced.
    """
    for name in files:
        check_new(folder / name, overwrite)
    write_files(folder, {name: json.dumps(content).encode() for name, content in files.items()})  # servers limit their size
    return f"{', '.join(files)} in {folder}"


def with_mean(figures: Mapping[str, System], settings: Sequence[str]) -> dict[str, System]:
    """The same with the mean over some settings as one more, for systems that have them."""

    def mean(system: System, ending: str) -> System:
        some = [system[at + ending] for at in settings if at + ending in system]
        names = [key for key in some[0] if key != "median_rank"] if some else []
        return {"mean" + ending: {key: sum(each[key] for each in some) / len(some) for key in names}} if some else {}

    return {who: {**system, **mean(system, ""), **mean(system, ASKED)} for who, system in figures.items()}
