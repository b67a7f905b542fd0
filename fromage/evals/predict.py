"""Predictions of Octopus for a data set: each image is encoded once, and answered greedily; what is left out is counted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from fromage.errors import UserError
from fromage.evals.base import Run
from fromage.evals.report import Report, System
from fromage.octopus.answers import Grounded, answer_ids
from fromage.octopus.decoding import ground
from fromage.octopus.examples import Example
from fromage.octopus.model import Octopus
from fromage.octopus.sources import Listed
from fromage.retrieval.encode import Options

LENGTH = "greedy, and at most as long as the longest right answer of the data is in the model's tokens"


class Predictions:
    """A data set's examples with the model's answers, `pairs`, in stored order; `skipped` counts what was left out."""

    def __init__(self, run: Run, pairs: list[tuple[Example, Grounded]], skipped: dict[str, int]) -> None:
        self.run, self.pairs, self.skipped = run, pairs, skipped

    def report(
        self,
        name: str,
        figures: System,
        protocol: Mapping[str, str],
        chance: System | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> Report:
        """See Run.report. The model's figures are under 'octopus', or under 'sequential' where it spells boxes as text."""
        systems = {"octopus" if self.run.model.num_queries else "sequential": figures} | (
            {"chance": chance} if chance else {}
        )
        counts = {"examples": len(self.pairs), "images": len(self.run.encoded.row), **(sizes or {})}
        return self.run.report(name, systems, counts, self.skipped, {**protocol, "answers": LENGTH})


def predict(model: Octopus, source: Listed, options: Options | None = None) -> Predictions:
    """Answers to all examples whose image is there and that point at no more objects than the model has queries.

    Raises UserError for files that are wrong, too many images lost, and where no example is left.
    """
    examples = list(source)
    few = [example for example in examples if not model.num_queries or len(example.meant) <= model.num_queries]
    if not few:
        raise UserError(
            f"{source.file}: every answer points at more objects than the model's {model.num_queries} object queries"
        )
    run = Run(model, source.file.name, [Path(example.image) for example in few], options)
    kept = run.keep(few, lambda example: [Path(example.image)])
    patches = dict(zip(run.encoded.row, run.encoded.features, strict=True))  # (P, m) each
    prompts = [(patches[Path(example.image)], example.instruction) for example in kept]
    longest = max(len(answer_ids(example, model.tokenizer, model.num_queries)) for example in kept)
    size = run.options.batch_size
    answers: list[Grounded] = []
    for start in tqdm(range(0, len(prompts), size), desc="predicting", unit="batch", leave=False):
        answers += ground(model, prompts[start : start + size], longest, size)
    skipped = {"examples with a lost image": len(few) - len(kept)}
    skipped["examples of more objects than queries"] = len(examples) - len(few)
    return Predictions(run, list(zip(kept, answers, strict=True)), dict(source.dropped) | skipped)
