"""POPE: is this in the image, yes or no? (Li et al., "Evaluating Object Hallucination ...", EMNLP 2023)

Protocol: an answer counts as yes where it begins with yes, and as no else; accuracy, precision, recall and F1 of yes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchmetrics.functional.classification import binary_accuracy, binary_f1_score, binary_precision, binary_recall

from fromage.evals.predict import predict
from fromage.evals.report import Figures, Report
from fromage.octopus.model import Octopus
from fromage.octopus.sources import Pope
from fromage.retrieval.encode import Options

MEASURES = {"accuracy": binary_accuracy, "precision": binary_precision, "recall": binary_recall, "f1": binary_f1_score}
PROTOCOL = {
    "precision, recall, f1": "yes is what is to be found",
    "yes": "share of the answers that begin with yes; all others count as no",
    "neither": "share of the answers that begin with neither yes nor no",
    "chance": "to be expected of a coin",
}


def evaluate(model: Octopus, data: Pope, options: Options | None = None) -> Report:
    """POPE's figures in percent, under the file's name without its ending. Raises UserError as predict does."""
    predictions = predict(model, data, options)
    labels = [example.answer == ("yes",) for example, _ in predictions.pairs]
    own = figures([answer.words for _, answer in predictions.pairs], labels)
    return predictions.report("pope", {data.file.stem: own}, PROTOCOL, {data.file.stem: coin(labels)})


def figures(texts: Sequence[str], labels: Sequence[bool]) -> Figures:
    """Figures of N answers in words, in percent; labels: whether yes is right."""
    lowered = [text.lower() for text in texts]
    yes, no = ([text.startswith(word) for text in lowered] for word in ("yes", "no"))
    predicted, target = torch.tensor(yes).int(), torch.tensor(labels).int()  # (N,)
    found = {name: float(measure(predicted, target)) for name, measure in MEASURES.items()}
    shares = {"yes": sum(yes) / len(yes), "neither": 1 - sum(yes + no) / len(yes)}
    return {name: 100 * value for name, value in (found | shares).items()}


def coin(labels: Sequence[bool]) -> Figures:
    """Expected figures of a coin, in percent."""
    share = sum(labels) / len(labels)
    found = {"accuracy": 0.5, "precision": share, "recall": 0.5, "f1": share / (share + 0.5), "yes": 0.5, "neither": 0.0}
    return {name: 100 * value for name, value in found.items()}
