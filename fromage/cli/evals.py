"""Commands of evaluation: FROMAGe's tables, each beside the frozen CLIP and chance, and those of Octopus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fromage.cli.command import Result

QUESTION = "where is {}?"


@dataclass(kw_only=True)
class Run:
    """What every evaluation takes."""

    ckpt: str
    limit: int | None = None
    device: str = "auto"

    def model(self) -> Any:
        """The FROMAGe of the checkpoint."""
        from fromage.models.fromage import load_model

        return load_model(self.ckpt, self.device)

    def told(self, report: dict[str, Any]) -> Result:
        """A report as tables."""
        from fromage.evals.report import markdown, table

        return Result("\n\n".join([table(report), *([markdown(report)] if report["headline"] else [])]), report)


@dataclass(kw_only=True)
class ImageRun(Run):
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
        from fromage.retrieval.encode import Options

        return Options(**{field.name: getattr(self, field.name) for field in fields(Options) if hasattr(self, field.name)})

    def reading(self) -> AbstractContextManager[None]:
        """In this context annotation files are read."""
        from fromage.data.annotations import odd_allowed

        return odd_allowed(self.max_lost)

    def point(self, evaluate: Callable[..., dict[str, Any]], data: Any) -> Result:
        """Evaluate an Octopus."""
        from fromage.octopus.module import load_octopus

        with self.reading():
            len(data)  # what is wrong with the files is told before towers are loaded
        return self.told(evaluate(load_octopus(self.ckpt, self.device), data, self.options()))


@dataclass(kw_only=True)
class RetrievalRun(ImageRun):
    """What a retrieval table takes.

    Attributes:
        clip: leave out the frozen CLIP's figures
    """

    clip: bool = True

    def model(self) -> Any:
        """The FROMAGe of the checkpoint. Raises UserError for a tower without a text tower, before it is loaded."""
        from fromage.checkpoints.load import read_saved
        from fromage.models.fromage import load_model
        from fromage.models.vision.registry import check_text_tower

        if self.clip:
            check_text_tower(read_saved(self.ckpt).settings.get("vision", ""))
        return load_model(self.ckpt, self.device)


@dataclass(kw_only=True)
class CaptionRun(RetrievalRun):
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

    def captions(self, annotations: Path, name: Any) -> Result:
        """Evaluate on a caption set."""
        from fromage.evals.caption_sets import read_captions
        from fromage.evals.coco import evaluate

        with self.reading():
            data = read_captions(annotations, self.images, name, self.split, self.limit)
        return self.told(evaluate(self.model(), data, self.options(), self.captioning))


def coco(annotations: Path, *, run: CaptionRun) -> Result:
    """Captions and images of COCO: recall both ways.

    Args:
        annotations: captions_val2017.json, or Karpathy's dataset_coco.json
    """
    return run.captions(annotations, "coco")


def flickr30k(annotations: Path, *, run: CaptionRun) -> Result:
    """Captions and images of Flickr30k: recall both ways.

    Args:
        annotations: Karpathy's dataset_flickr30k.json
    """
    return run.captions(annotations, "flickr30k")


def vist(annotations: Path, *, run: RetrievalRun) -> Result:
    """Stories of VIST: which image is the last one.

    Args:
        annotations: val.story-in-sequence.json
    """
    from fromage.evals.vist import evaluate, read_stories

    with run.reading():
        data = read_stories(annotations, run.images, run.limit)
    return run.told(evaluate(run.model(), data, run.options()))


def visdial(
    annotations: Path, *, dense: Path, answers: bool = True, scores: Path | None = None, run: RetrievalRun
) -> Result:
    """Dialogues of VisDial: rank answers, and find the image.

    Args:
        annotations: visdial_1.0_val.json
        dense: visdial_1.0_val_dense_annotations.json
        answers: find the image from the dialogue, and rank no answers
    """
    from fromage.evals.dialogues import read_dialogues
    from fromage.evals.visdial import evaluate

    with run.reading():
        data = read_dialogues(annotations, dense, run.images, run.limit)
    return run.told(evaluate(run.model(), data, run.options(), answers, scores))


def few_shot(*, world: Path, shots: Sequence[int] = (0, 1, 2, 4), run: Run) -> Result:
    """Learning from examples in the prompt, on the toy world.

    Args:
        world: folder of `fromage toy make`
        shots: numbers of examples in front of a question
    """
    from fromage.evals.few_shot import evaluate, read_world

    data = read_world(world, run.limit)
    return run.told(evaluate(run.model(), data, shots=shots))


def refcoco(
    refs: Path, *, instances: Path, split: str = "val", question: str = QUESTION, match: str | None = None, run: ImageRun
) -> Result:
    """Octopus: referring expressions of RefCOCO, RefCOCO+ or RefCOCOg, the object meant among all.

    Args:
        refs: refs(unc).p, refs(google).p or refs(umd).p
        instances: instances.json that came with it
        split: val, and depending on the file testA, testB, test or train
        match: evaluate only expressions that match this regular expression, such as '(left|right)'
    """
    from fromage.evals.refcoco import evaluate
    from fromage.octopus.sources import RefCOCO

    return run.point(evaluate, RefCOCO(str(refs), str(instances), str(run.images), split, question, run.limit, match))


def pope(file: Path, *, run: ImageRun) -> Result:
    """Octopus: questions of POPE, whether something is in an image.

    Args:
        file: coco_pope_random.json or another of POPE's
    """
    from fromage.evals.pope import evaluate
    from fromage.octopus.sources import Pope

    return run.point(evaluate, Pope(str(file), str(run.images), run.limit))


def instructions(file: Path, *, padded: bool = False, run: ImageRun) -> Result:
    """Octopus: instructions of LLaVA's kind, answers that point at several objects among them.

    Args:
        file: JSON of LLaVA's instructions
        padded: boxes are shares of the image padded to a square
    """
    from fromage.evals.instructions import evaluate
    from fromage.octopus.sources import Instructions

    return run.point(evaluate, Instructions(str(file), str(run.images), padded, run.limit))
