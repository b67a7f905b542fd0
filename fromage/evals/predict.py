"""An Octopus is asked what a data set asks: each image is encoded once, what cannot be asked is counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fromage.errors import UserError
from fromage.evals.report import System, make_report
from fromage.octopus.answers import Grounded, answer_ids
from fromage.octopus.decoding import ground
from fromage.octopus.examples import Example
from fromage.octopus.model import Octopus
from fromage.octopus.sources import Listed
from fromage.retrieval.encode import Encoded, Options, encode_files

LENGTH = "greedy, and at most as long as the longest right answer of the data is in the model's tokens"


@dataclass(frozen=True)
class Asked:
    """A data set's examples and what a model answered.

    Attributes:
        answered: examples with their answers, in stored order.
        skipped: what was left out beside the images lost, by cause.
    """

    model: Octopus
    source: Listed
    answered: list[tuple[Example, Grounded]]
    encoded: Encoded
    skipped: dict[str, int]

    def report(
        self,
        name: str,
        system: System,
        protocol: dict[str, str],
        chance: System | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """Of the evaluation `name`, see make_report. The model's figures stand under 'octopus' or 'sequential'."""
        systems = {"octopus" if self.model.num_queries else "sequential": system} | ({"chance": chance} if chance else {})
        counts = {"examples": len(self.answered), "images": len(self.encoded.row), **(sizes or {})}
        protocol = protocol | {"answers": LENGTH}
        data = self.source.file.name
        return make_report(name, self.model, systems, protocol, data, counts, self.encoded, self.skipped, {}, ())


def ask(model: Octopus, source: Listed, options: Options) -> Asked:
    """All answers. Raises UserError for files that are wrong, too many images lost, and where nothing can be asked."""
    examples = list(source)
    few = [example for example in examples if not model.num_queries or len(example.meant) <= model.num_queries]
    encoded = encode_files(model, [Path(example.image) for example in few], options)
    kept = [example for example in few if Path(example.image) in encoded.row]
    if not kept:
        few_queries = f"the model's {model.num_queries} object queries"
        raise UserError(f"{source.file}: every answer points at more objects than {few_queries}")
    patches = dict(zip(encoded.row, encoded.features, strict=True))  # (P, m) each
    asked = [(patches[Path(example.image)], example.instruction) for example in kept]
    longest = max(len(answer_ids(example, model.tokenizer, model.num_queries)) for example in kept)
    answers: list[Grounded] = []
    for start in tqdm(range(0, len(asked), options.batch_size), desc="asking", unit="batch", leave=False):
        answers += ground(model, asked[start : start + options.batch_size], longest, options.batch_size)
    skipped = dict(source.dropped) | {"examples with a lost image": len(few) - len(kept)}
    skipped["examples of more objects than queries"] = len(examples) - len(few)
    return Asked(model, source, list(zip(kept, answers, strict=True)), encoded, skipped)
