"""Options that evaluations share, and how a data set is read and evaluated with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fromage.cli.command import Result
from fromage.config import AsLoaded
from fromage.errors import UserError


@dataclass(kw_only=True)
class EvalOptions:
    """What every evaluation takes."""

    ckpt: str
    limit: int | None = None
    device: str = "auto"
    quantize: AsLoaded | None = None

    def model(self) -> Any:
        """The FROMAGe of the checkpoint."""
        from fromage.models.fromage import load_model

        return load_model(self.ckpt, self.device, quantize=self.quantize)

    def told(self, report: dict[str, Any]) -> Result:
        """A report as tables."""
        from fromage.evals.report import markdown, table

        return Result("\n\n".join([table(report), *([markdown(report)] if report["headline"] else [])]), report)


@dataclass(kw_only=True)
class ImageOptions(EvalOptions):
    """What an evaluation on image files takes.

    Attributes:
        max_lost: share of the images that may be missing or broken, and of entries that may be odd, 0 to 1
    """

    images: Path
    batch_size: int = 64
    workers: int = 0
    max_lost: float = 0.05

    def options(self) -> Any:
        """As the evaluations take them."""
        from fromage.evals.options import Options

        return Options(**{field.name: getattr(self, field.name) for field in fields(Options) if hasattr(self, field.name)})

    @contextmanager
    def reading(self) -> Iterator[None]:
        """In this context annotation files are read; the report counts the entries that were left out."""
        from fromage.data.annotations import odd_allowed

        with odd_allowed(self.max_lost) as allowed:
            yield
        self.odd = allowed.count

    def judged(self, read: Callable[[], Any], evaluate: Callable[..., Any], *more: Any) -> Result:
        """Read data and evaluate the model on them; what is wrong with the files is told before towers are loaded."""
        with self.reading():
            data = read()
        return self.told(evaluate(self.model(), data, self.options(), *more))

    def told(self, report: Any) -> Result:
        """As of EvalOptions, with the entries that were left out in reading."""
        odd = getattr(self, "odd", 0)
        return super().told(report | {"skipped": report["skipped"] | {"odd entries": odd}} if odd else report)


@dataclass(kw_only=True)
class OctopusOptions(ImageOptions):
    """What an evaluation of Octopus takes.

    Attributes:
        features: folder of stored patches, as of data.features in training; what it lacks is added (default: not stored)
    """

    features: Path | None = None

    def point(self, evaluate: Callable[..., dict[str, Any]], data: Sequence[Any], masks: bool = False) -> Result:
        """Evaluate an Octopus on data sets. masks: read their masks, where the model has some."""
        from fromage.octopus.model import load_octopus
        from fromage.octopus.sources.file_source import with_masks

        self._read(data)  # what is wrong with the files is told before towers are loaded
        model = load_octopus(self.ckpt, self.device, quantize=self.quantize)
        if masks and model.masks:
            with_masks(data)
            self._read(data)
        return self.told(evaluate(model, data, self.options()))

    def _read(self, data: Sequence[Any]) -> None:
        with self.reading():
            for each in data:
                len(each)


@dataclass(kw_only=True)
class RetrievalOptions(ImageOptions):
    """What a retrieval table takes.

    Attributes:
        clip: give the frozen CLIP's figures too. --no-clip: leave out the frozen CLIP's figures (none without a text tower)
    """

    clip: bool = True


@dataclass(kw_only=True)
class CaptionOptions(RetrievalOptions):
    """What a caption set takes.

    Attributes:
        split: which of Karpathy's splits
        captioning: caption the images too: BLEU, METEOR, ROUGE-L, CIDEr; needs Java
    """

    split: Literal["train", "val", "test"] = "test"
    captioning: bool = False

    def __post_init__(self) -> None:
        """Raise UserError where what measures captions is not installed."""
        from fromage.evals.captioning import check_installed

        if self.captioning:
            check_installed()

    def captions(self, annotations: Path, name: Any, eccv: bool = False) -> Result:
        """Evaluate on a caption set; eccv: on ECCV Caption's."""
        from fromage.evals.caption_sets import read_caption_set
        from fromage.evals.coco import evaluate
        from fromage.evals.eccv import read_test

        if eccv and self.limit:
            raise UserError("--eccv counts over the whole test split; leave out --limit")

        def read() -> Any:
            if eccv:
                return read_test(annotations, self.images)
            return read_caption_set(annotations, self.images, name, self.split, self.limit)

        return self.judged(read, evaluate, self.captioning)


@dataclass(kw_only=True)
class ServedOptions(RetrievalOptions):
    """What a benchmark takes whose test split a server evaluates.

    Attributes:
        server_files: folder for the answers, in the form that the benchmark's server takes
    """

    server_files: Path | None = None
    overwrite: bool = False

    def check(self, data: Any, pattern: str) -> Any:
        """The data. Raises UserError for files that are in the way, and for a test split without server files."""
        from fromage.cli.options import check_free

        if self.server_files:
            check_free(self.server_files, self.overwrite, pattern)
        data.check(self.server_files)
        return data
