"""Contextual retrieval: queries of texts and images, what each is to find, and among which items.

A benchmark names its tasks; embedding, ranks, figures, chance and files for servers stand here. Systems are FROMAGe and the
frozen CLIP, whose query is the mean of its unit rows of the query's images and words, or either alone:

    clip           images and words, each image and the words with the same weight
    clip image     the images alone
    clip text      the words alone
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fromage.evals.base import RetrievalRun, Retriever
from fromage.evals.report import Figures, System
from fromage.images.regions import Place
from fromage.images.transforms import Framing
from fromage.models.encode_files import Encoded
from fromage.models.prompts import Special
from fromage.retrieval.metrics import (
    WHOLE,
    Items,
    Scope,
    best,
    chance,
    chance_average_precision,
    chance_recall,
    mean_average_precision,
    places,
    rank_figures,
    recall_at,
)


class Query(NamedTuple):
    """A query of texts and images.

    Attributes:
        prompt: FROMAGe's, images by their places; [RET] comes after it.
        words: CLIP's text; None for none.
    """

    prompt: Sequence[str | Place | Special]
    words: str | None = None

    @property
    def images(self) -> list[Place]:
        """The images of the prompt, in order."""
        return [part for part in self.prompt if isinstance(part, Place)]


@dataclass(frozen=True, eq=False)
class Side:
    """Queries, or a gallery: items that are embedded together, once for all tasks that have them.

    Attributes:
        what: their name, for the progress bar.
        items: queries, or places of images, which are embedded as in an index.
        framing: how images become the tower's input.
    """

    what: str
    items: Sequence[Query] | Sequence[Place]
    framing: Framing = "own"

    @cached_property
    def number(self) -> dict[Query | Place, int]:
        """The number of an item among the items."""
        return {item: number for number, item in enumerate(self.items)}

    def numbers(self, items: Sequence[Place]) -> list[int]:
        """The numbers of items; of those that are not there, none."""
        return [self.number[item] for item in items if item in self.number]


class Measure(NamedTuple):
    """Figures of places, and what to expect of a random order.

    Attributes:
        figures: places (N, R), as `metrics.places` gives them -> figures.
        chance: (items that a query is compared with, how many of them are right) -> the same figures.
    """

    figures: Callable[[Tensor], Figures]
    chance: Callable[[int, int], Figures]


RANKS = Measure(lambda place: rank_figures(place[:, 0]), chance)
PRECISION = Measure(mean_average_precision, chance_average_precision)


def recalls(*ks: int) -> Measure:
    """R@k for each k."""
    return Measure(lambda place: recall_at(place[:, 0], ks), partial(chance_recall, ks=ks))


@dataclass(frozen=True)
class RetrievalTask:
    """Queries, the gallery that they search, and which of its items are right.

    Attributes:
        right: for each query, numbers of items of the gallery.
        scope: what a query is compared with.
        only: the system that runs it; None for all.
    """

    queries: Side
    gallery: Side
    right: Items
    scope: Scope = WHOLE
    measure: Measure = RANKS
    only: str | None = None

    def chance(self) -> Figures:
        """The figures to be expected of a random order, the mean over the queries."""
        counts = Counter(self.sizes())
        parts = [(self.measure.chance(*sizes), count / len(self.right)) for sizes, count in counts.items()]
        return {name: sum(figures[name] * share for figures, share in parts) for name in parts[0][0]}

    def sizes(self) -> list[tuple[int, int]]:
        """How many items each query is compared with, and how many of them are right."""
        total, (excluded, among, _) = len(self.gallery.items), self.scope
        out = []
        for query, items in enumerate(self.right):
            own = set(items)
            gone = set(excluded[query]) - own if excluded is not None else set()
            shown = total - len(gone) if among is None else len((set(among[query]) - gone) | own)
            out.append((shown, len(own)))
        return out


class ContextualRun(RetrievalRun):
    """A run of tasks."""

    def set_apart(self) -> None:
        """Make the images alone and the words alone systems too, of CLIP."""
        clip = [system for system in self.systems if system.name == "clip"]
        parts: tuple[Literal["image", "text"], ...] = ("image", "text")
        self.systems += [system._replace(name=f"clip {part}", sees=part) for part in parts for system in clip]

    def images(self, images: Sequence[Place], framing: Framing = "own") -> Side:
        """A gallery of those of the images that were encoded, each once."""
        return Side("images", [image for image in dict.fromkeys(images) if image in self.encoded.row], framing)

    def places(self, tasks: Mapping[str, RetrievalTask]) -> dict[str, dict[str, Tensor]]:
        """For each system and task the places (N, R) of the right items; see metrics.places."""
        found: dict[str, dict[str, Tensor]] = {}
        for system in self.systems:
            embedded = _Embedded(system, self.encoded)
            found[system.name] = {
                at: places(embedded(task.queries), embedded(task.gallery), task.right, task.scope)
                for at, task in tasks.items()
                if task.only in (None, system.name)
            }
        return found

    def evaluate(self, tasks: Mapping[str, RetrievalTask]) -> dict[str, System]:
        """The figures of every system in every task, and of chance."""
        found = {
            who: {at: tasks[at].measure.figures(place) for at, place in some.items()}
            for who, some in self.places(tasks).items()
        }
        return found | {"chance": {at: task.chance() for at, task in tasks.items()}}

    def best(self, task: RetrievalTask, k: int) -> list[list[int]]:
        """FROMAGe's k best items of the gallery for each query, the best first."""
        embedded = _Embedded(self.systems[0], self.encoded)
        return best(embedded(task.queries), embedded(task.gallery), k, task.scope)


class _Embedded:
    """What a system has embedded: each side once, and the images of each framing once."""

    def __init__(self, system: Retriever, encoded: Encoded) -> None:
        self.system, self.encoded = system, encoded
        self._sides: dict[Side, Tensor] = {}
        self._images: dict[Framing, Tensor] = {}

    def __call__(self, side: Side) -> Tensor:
        """(N, e) unit rows of the items of a side."""
        if side not in self._sides:
            self._sides[side] = self._embed(side)
        return self._sides[side]

    def _embed(self, side: Side) -> Tensor:
        queries = [item for item in side.items if isinstance(item, Query)]
        if not queries:
            return self.images(side.framing)[[self.encoded.row[item] for item in side.items]]  # type: ignore[index]
        if self.system.sees == "prompt":
            return self.system.embed_text([self._prompt(query, side.framing) for query in queries], side.what)
        return self._mixed(queries, side)

    def images(self, framing: Framing) -> Tensor:
        """(n, e) rows of all images, in the order of their features."""
        if framing not in self._images:
            self._images[framing] = self.system.embed_images(self.encoded.views[framing])
        return self._images[framing]

    def _prompt(self, query: Query, framing: Framing) -> list[str | Special | Tensor]:
        """With features (m,) for images."""
        features = self.encoded.views[framing]
        return [features[self.encoded.row[part]] if isinstance(part, Place) else part for part in query.prompt]

    def _mixed(self, queries: Sequence[Query], side: Side) -> Tensor:
        """CLIP's queries (N, e): the mean of the unit rows that the system sees of each."""
        rows: list[list[Tensor]] = [[] for _ in queries]
        if self.system.sees != "text":
            for some, query in zip(rows, queries, strict=True):
                some += [self.images(side.framing)[self.encoded.row[image]] for image in query.images]
        if self.system.sees != "image" and (spoken := [i for i, query in enumerate(queries) if query.words is not None]):
            texts = self.system.embed_text([queries[i].words for i in spoken], side.what)  # (n, e)
            for i, row in zip(spoken, texts, strict=True):
                rows[i].append(row)
        return F.normalize(torch.stack([torch.stack(some).mean(0) for some in rows]), dim=-1)  # (N, e)
