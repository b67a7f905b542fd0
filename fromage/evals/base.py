"""What the benchmarks share: images encoded once, what is lost left out, queries embedded by each system, the report."""

from __future__ import annotations

import hashlib
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from fromage.distribution import versions
from fromage.errors import UserError
from fromage.evals.options import Options
from fromage.evals.report import SYSTEMS, Report, System
from fromage.images.regions import Place
from fromage.images.transforms import Framing
from fromage.models.base import VisualPrefixLM
from fromage.models.encode_files import encode_files, lost_counts
from fromage.models.fromage import Fromage
from fromage.models.frozen import digest_of_samples
from fromage.models.prompts import batches_by_length
from fromage.retrieval.metrics import chance

Item = TypeVar("Item")
PACKAGES = ("fromage", "torch", "torchvision", "transformers", "open_clip_torch", "torchmetrics")
NAMED = 20  # lost images that a report names


class EvaluationRun:
    """One run of a benchmark: of a model on a data set, `data` in the report, whose images are `encoded` once.

    Attributes:
        told: topics of the report's protocol that are of this run, by name.
    """

    told: Mapping[str, str] = {}

    def __init__(
        self,
        model: VisualPrefixLM,
        data: str,
        images: Sequence[Place],
        options: Options | None,
        framings: Sequence[Framing] = ("own",),
    ) -> None:
        """Encode each distinct image, in the framings of the protocols that are run.

        Raises UserError where more than options.max_lost of them are lost.
        """
        self.model, self.data, self.options = model, data, options or Options()
        self.encoded = encode_files(model, images, self.options, framings)

    def keep(self, items: Sequence[Item], images: Callable[[Item], Sequence[Place]]) -> list[Item]:
        """The items of which all images were encoded. Raises UserError where there is none."""
        kept = [item for item in items if all(path in self.encoded.row for path in images(item))]
        if not kept:
            raise UserError(f"{self.data}: no entry has all its images; name the right --images")
        return kept

    def report(
        self,
        name: str,
        figures: Mapping[str, System],
        sizes: Mapping[str, int],
        skipped: Mapping[str, int],
        protocol: Mapping[str, str],
        paper: Mapping[str, System] | None = None,
        headline: Sequence[str] = (),
    ) -> Report:
        """As make_report, of this run's model, data and lost images."""
        about = (self.model, name, self.data, figures, sizes, skipped, {**protocol, **self.told}, self.encoded.lost)
        return make_report(*about, paper, headline)


def make_report(
    model: VisualPrefixLM,
    name: str,
    data: str,
    figures: Mapping[str, System],
    sizes: Mapping[str, int],
    skipped: Mapping[str, int],
    protocol: Mapping[str, str],
    lost: Sequence[tuple[str, Place]],
    paper: Mapping[str, System] | None = None,
    headline: Sequence[str] = (),
) -> Report:
    """Everything about a run, ready for JSON; keys as the arguments, `name` as evaluation, each system by its name.

    Args:
        data: what it was evaluated on.
        figures: setting -> figures of each system; shares in percent.
        sizes: of the gallery, and how many queries there were.
        skipped: what was left out beside the images lost, by cause.
        protocol: what settings and figures mean.
        lost: (cause, path) of images that were missing or broken.
        paper: published figures of these systems, and of systems of others, which have rows of their own. Those of settings
            that were run are kept, and all where none was run; who gives any must know that they were measured on this data.
        headline: settings that are columns of the Markdown table; without any there is none.
    """
    every = figures or paper or {}  # of a test split nothing is known but what was published
    run = {setting for settings in every.values() for setting in settings}
    published = {
        who: {at: f for at, f in settings.items() if at in figures.get(who, run)}
        for who, settings in (paper or {}).items()
        if who in figures or who not in SYSTEMS or not figures
    }
    return {
        "evaluation": name,
        **{who: {at: _rounded(f) for at, f in settings.items()} for who, settings in figures.items()},
        "paper": {who: settings for who, settings in published.items() if settings},
        "protocol": dict(protocol),
        "data": data,
        "headline": list(headline),
        **sizes,
        "skipped": {**lost_counts(lost), **skipped},
        "lost": [f"{path} ({cause})" for cause, path in lost[:NAMED]],
        "checkpoint": model.fingerprint(),
        **quantized(model),
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
    }


def quantized(model: VisualPrefixLM) -> dict[str, str]:
    """What holds the language model's layers, where they are quantised: fingerprints of FROMAGe do not tell."""
    return {"quantized": model.lm.quantized} if model.lm.quantized else {}


def made_by(model: VisualPrefixLM, images: Sequence[Path]) -> dict[str, str]:
    """What stored answers and scores depend on: the model, its language model's weights, and where the images are."""
    folders = {folder: folder.resolve() for folder in {image.parent for image in images}}
    listed = [str(folders[image.parent] / image.name) for image in images]
    return {
        "checkpoint": model.fingerprint(),
        "language_model": digest_of_samples(model.lm),
        "images": hashlib.sha256("\0".join(listed).encode("utf-8", "surrogatepass")).hexdigest()[:16],
        **quantized(model),
    }


def no_baseline(model: VisualPrefixLM) -> str:
    """What a table says in place of the baseline of a vision tower without text tower."""
    return f"{model.vision.name} has no text tower: no CLIP baseline"


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}


class Retriever(NamedTuple):
    """A system, fromage or clip, that embeds texts and images as unit rows of one space, e wide.

    text takes N texts, FROMAGe's also N prompts with images, embed_images (N, m) features; both give (N, e). sees: what of a
    query is embedded: the prompt as it is, or the mean of the rows of both its images and its words, or of those alone.
    """

    name: str
    text: Callable[[Any], Tensor]
    embed_images: Callable[[Tensor], Tensor]
    batch_size: int
    sees: Literal["prompt", "both", "image", "text"] = "both"

    def embed_text(self, texts: Sequence[Any], what: str) -> Tensor:
        """N texts -> (N, e), those of like length together, with a progress bar."""
        batches = batches_by_length(texts, self.batch_size)
        shown = tqdm(batches, f"{what}, {self.name}", unit="batch", leave=False)
        made = torch.cat([self.text([texts[i] for i in at]) for at in shown])  # (N, e)
        order = torch.tensor([i for at in batches for i in at], device=made.device)  # (N,)
        return torch.empty_like(made).index_copy_(0, order, made)


class RetrievalRun(EvaluationRun):
    """A run of a retrieval benchmark; `systems` are FROMAGe and, unless options.clip is false, the frozen CLIP.

    Of a vision tower without text tower there is no CLIP: a warning says so at once, and the report's protocol.
    """

    def __init__(
        self,
        model: Fromage,
        data: str,
        images: Sequence[Place],
        options: Options | None,
        framings: Sequence[Framing] = ("own",),
    ) -> None:
        """As of EvaluationRun; what the text tower lacks is known before the first image is encoded."""
        options = options or Options()
        size = options.batch_size
        self.systems = [Retriever("fromage", partial(model.embed_text, batch_size=size), model.embed_images, size, "prompt")]
        self.told: dict[str, str] = {}
        if options.clip:
            clip = model.vision.text_tower()
            if clip:
                self.systems.append(Retriever("clip", clip.embed_text, clip.embed_features, size))
            else:
                self.told = {"clip": no_baseline(model)}
                warnings.warn(self.told["clip"], stacklevel=2)
        super().__init__(model, data, images, options, framings)

    def compare(
        self, figures: Callable[[Retriever], System], gallery: Callable[[str], tuple[int, int]]
    ) -> dict[str, System]:
        """Figures of every system, and of chance: gallery gives a setting's items, and how many are a query's own."""
        found = {system.name: figures(system) for system in self.systems}
        return found | {"chance": {setting: chance(*gallery(setting)) for setting in found["fromage"]}}
