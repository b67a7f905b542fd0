"""Predictions of Octopus for data sets: images pass through in batches, answers are greedy, what is left out is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from fromage.errors import UserError
from fromage.evals.base import make_report
from fromage.evals.options import Options
from fromage.evals.report import Report, System
from fromage.images.regions import Place
from fromage.models.base import VisualPrefixLM
from fromage.models.encode_files import Encoded, check_lost, encode_batches
from fromage.octopus.answers import GroundedAnswer, answer_ids
from fromage.octopus.boxes import spelled
from fromage.octopus.decoding import ground
from fromage.octopus.examples import Example
from fromage.octopus.model import Octopus
from fromage.octopus.patch_store import PatchStore
from fromage.octopus.sources import FileSource

Source = TypeVar("Source", bound=FileSource)

LENGTH = "greedy, and at most as long as the longest right answer of the data is in the model's tokens"
SPELLED_BOX = "a box that is spelled may have a token for each of its characters"
SECONDS = "of one example, from image file to answer, on {device}, {batch_size} at a time"


class ImageStream:
    """Items in batches, each item with its image's features; iterate once. Memory holds one batch of features.

    Items of one image follow one another, in the order in which images first appear, so that each image is encoded once.

    Attributes:
        images: paths whose features were had so far.
        lost: (cause, path) of the images that had none.
    """

    def __init__(
        self, model: VisualPrefixLM, paths: Sequence[Path | None], options: Options, whole: int | None = None
    ) -> None:
        """paths: of each item's image; None for an item without.

        whole: images of which options.max_lost may be lost, where these are what a killed run left; None: these alone.
        """
        self.whole = whole
        self.model, self.paths, self.options = model, paths, options
        self.images: set[Place] = set()
        self.lost: list[tuple[str, Place]] = []
        first: dict[Path | None, int] = {}
        order = sorted(range(len(paths)), key=lambda i: first.setdefault(paths[i], i))
        size = options.batch_size
        self.batches = [order[start : start + size] for start in range(0, len(order), size)]

    def __iter__(self) -> Iterator[tuple[list[int], list[Tensor | None]]]:
        """Numbers of items, and their features, (m,) or (P, m) in the dtype of tower or store; None where there is no image.

        Items whose image is lost are left out. Raises UserError where more than options.max_lost of the images are.
        """
        needed = [list(dict.fromkeys(path for i in batch if (path := self.paths[i]))) for batch in self.batches]
        known: set[Place] = set()
        new = []
        for paths in needed:
            new.append([path for path in paths if path not in known])
            known.update(paths)
        held: dict[Place, Tensor] = {}
        for batch, paths, encoded in zip(self.batches, needed, self._encoded(new), strict=True):
            held = {path: held[path].clone() for path in paths if path in held}  # a view would keep the batch it is of
            held |= {path: encoded.features[row] for path, row in encoded.row.items()}
            self.images |= encoded.row.keys()
            self.lost += encoded.lost
            numbers = [i for i in batch if self.paths[i] is None or self.paths[i] in held]
            yield numbers, [None if (path := self.paths[i]) is None else held[path] for i in numbers]

    def store_features(self) -> None:
        """Encode what options.features, the folder of stored patches, has not yet; nothing without such a folder."""
        if self.options.features is not None:
            names = [str(path) for path in dict.fromkeys(self.paths) if path]
            PatchStore(self.options.features, self.model.vision).add(names, self.options.batch_size, self.options.workers)

    def _encoded(self, batches: list[list[Path]]) -> Iterator[Encoded]:
        """The features of batches of distinct images: encoded now, or from a folder of stored patches."""
        options = self.options
        if options.features is None:
            yield from encode_batches(self.model, batches, options, whole=self.whole)
            return
        self.store_features()
        names = [str(path) for batch in batches for path in batch]
        store = PatchStore(options.features, self.model.vision)
        gone = [(store.lost[name], Path(name)) for name in names if name in store.lost]
        check_lost(gone, self.whole or len(names), options.max_lost)
        for batch in batches:
            good = [path for path in batch if str(path) in store.rows]
            lost = [(store.lost[str(path)], path) for path in batch if path not in good]
            rows = torch.stack([store[str(path)] for path in good]) if good else torch.empty(0)  # (b, P, m)
            yield Encoded({"own": rows}, {path: i for i, path in enumerate(good)}, lost)


@dataclass(frozen=True)
class Predictions:
    """The examples of data sets with a model's answers.

    Attributes:
        model: which answered.
        sources: the data sets.
        pairs: for each of them examples and answers, in stored order.
        skipped: how many entries were left out, by cause.
        images: paths of the images that were encoded.
        lost: (cause, path) of the others.
        seconds: of one example, from image file to answer.
        options: which it ran under.
    """

    model: Octopus
    sources: Sequence[FileSource]
    pairs: list[list[tuple[Example, GroundedAnswer]]]
    skipped: Mapping[str, int]
    images: set[Place]
    lost: list[tuple[str, Place]]
    seconds: float
    options: Options


def predict(
    model: Octopus,
    sources: Sequence[FileSource],
    options: Options | None = None,
    look: Callable[[Example, GroundedAnswer], None] | None = None,
    least: int = 1,
) -> Predictions:
    """Answers to all examples whose image is there and that point at no more objects than the model has queries.

    look is shown each of them with its masks, which are not kept; its time does not count. least: tokens that an answer may
    have, however short the right ones are.
    Raises UserError for files that are wrong, too many images lost, and where no example is left.
    """
    options = options or Options()
    every = [(number, example) for number, source in enumerate(sources) for example in source]
    few = [each for each in every if not model.num_queries or len(each[1].meant) <= model.num_queries]
    if not few:
        raise UserError(
            f"{sources[0].file}: every answer points at more objects than the model's {model.num_queries} object queries"
        )
    longest = max(least, *(room(example, model) for _, example in few))
    stream = ImageStream(model, [Path(example.image) for _, example in few], options)
    answers: dict[int, GroundedAnswer] = {}
    looked = 0.0
    stream.store_features()
    start = perf_counter()
    for numbers, patches in tqdm(stream, "predicting", len(stream.batches), unit="batch", leave=False):
        asked = [(shown, few[i][1].instruction) for i, shown in zip(numbers, patches, strict=True)]
        for i, answer in zip(numbers, ground(model, asked, longest, options.batch_size), strict=True):
            if look:
                began = perf_counter()
                look(few[i][1], answer)
                looked += perf_counter() - began
            answers[i] = replace(answer, masks=[])
    seconds = (perf_counter() - start - looked) / max(1, len(answers))
    pairs: list[list[tuple[Example, GroundedAnswer]]] = [[] for _ in sources]
    for i in sorted(answers):
        pairs[few[i][0]].append((few[i][1], answers[i]))
    skipped = {what: sum(source.dropped[what] for source in sources) for source in sources for what in source.dropped}
    skipped["examples with a lost image"] = len(few) - len(answers)
    skipped["examples of more objects than queries"] = len(every) - len(few)
    return Predictions(model, sources, pairs, skipped, stream.images, stream.lost, seconds, options)


def room(example: Example, model: Octopus) -> int:
    """Tokens of the right answer; of a box that is spelled as many as any box can have: one for each character."""
    count = len(answer_ids(example, model.tokenizer, model.num_queries))
    if model.num_queries:
        return count
    texts = [spelled(example.boxes[piece]) for piece in example.answer if isinstance(piece, int)]
    return count + sum(len(text) - len(model.tokenizer.encode(text)) for text in texts)


def listed(data: Source | Sequence[Source]) -> list[Source]:
    """One data set, or several, as a list."""
    return [data] if isinstance(data, FileSource) else list(data)


def report(
    name: str,
    parts: Sequence[Predictions],
    figures: System,
    protocol: Mapping[str, str],
    chance: System | None = None,
    sizes: Mapping[str, int] | None = None,
    paper: Mapping[str, System] | None = None,
) -> Report:
    """See make_report. The model's figures are under 'octopus', or under 'sequential' where it spells boxes as text."""
    model, options = parts[0].model, parts[0].options
    systems = {"octopus" if model.num_queries else "sequential": figures} | ({"chance": chance} if chance else {})
    images: set[Place] = set().union(*(part.images for part in parts))
    counts = {"examples": sum(len(pairs) for part in parts for pairs in part.pairs), "images": len(images), **(sizes or {})}
    skipped = {what: sum(part.skipped.get(what, 0) for part in parts) for part in parts for what in part.skipped}
    lost = list(dict.fromkeys(each for part in parts for each in part.lost))
    data = ", ".join(dict.fromkeys(source.file.name for part in parts for source in part.sources))
    told = {"answers": LENGTH + f"; {SPELLED_BOX}" * (not model.num_queries), **protocol}
    if any("seconds" in some for some in figures.values()):
        told["seconds"] = SECONDS.format(device=model.device, batch_size=options.batch_size)
        told["seconds"] += ", patches stored before" * (options.features is not None)
    return make_report(model, name, data, systems, counts, skipped, told, lost, paper)
