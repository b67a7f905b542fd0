"""POPE: is this in the image, yes or no? (Li et al., "Evaluating Object Hallucination ...", EMNLP 2023)

Protocol: that of POPE's own script. Of an answer the first sentence counts, as no where it holds the word no or not, and as
yes else; accuracy, precision, recall and F1 of yes. The benchmark has three splits, random, popular and adversarial, of
other objects that are asked for and not there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchmetrics.functional.classification import binary_accuracy, binary_f1_score, binary_precision, binary_recall

from fromage.errors import UserError
from fromage.evals.options import Options
from fromage.evals.predict import listed, predict, report
from fromage.evals.report import Figures, Report, System
from fromage.octopus.model import Octopus
from fromage.octopus.sources import Pope

MEASURES = {"accuracy": binary_accuracy, "precision": binary_precision, "recall": binary_recall, "f1": binary_f1_score}
SENTENCE = 16  # tokens of an answer at least, where it does not end before: its first sentence counts
PROTOCOL = {
    "precision, recall, f1": "yes is what is to be found",
    "yes": "share of the answers whose first sentence holds neither no nor not; as POPE's script has it, these count as yes",
    "neither": "share of the answers that begin with neither yes nor no",
    "answers": f"greedy, and of {SENTENCE} tokens at most",
    "chance": "to be expected of a coin",
}
# The published files and their numbers of questions; coco_pope_random.json came with 2,910 and later with 3,000.
OFFICIAL = {
    "coco_pope_random": {2910, 3000},
    "coco_pope_popular": {3000},
    "coco_pope_adversarial": {3000},
}
PAPER: dict[str, System] = {  # of the Octopus paper
    "Octopus, 224 px": {"mean": {"f1": 84.8}},
    "Shikra 7B, 224 px": {"mean": {"f1": 83.9}},
}


def evaluate(model: Octopus, data: Pope | Sequence[Pope], options: Options | None = None) -> Report:
    """Figures in percent of one or several files, by their names without ending; of several also the mean F1.

    Where the questions of a file are of several kinds, by their `category`, FILE/KIND has those of each. Files that are not
    POPE's by name are reported as yes-or-no questions. Raises UserError as predict does, and for two files of one name.
    """
    files = listed(data)
    names = [file.file.stem for file in files]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{min(twice)}: two files of this name; give each split once, or rename one")
    predictions = predict(model, files, options, least=SENTENCE)
    own: System = {}
    chance: System = {}
    for file, name, pairs in zip(files, names, predictions.pairs, strict=True):
        if not pairs:
            raise UserError(f"{name}: no question has its image; name the right --images")
        kinds = sorted({file.kinds[example.key] for example, _ in pairs})
        for kind in [None, *(kinds if len(kinds) > 1 else [])]:
            some = [pair for pair in pairs if kind in (None, file.kinds[pair[0].key])]
            labels = [example.answer == ("yes",) for example, _ in some]
            setting = name if kind is None else f"{name}/{kind}"
            own[setting], chance[setting] = figures([answer.words for _, answer in some], labels), coin(labels)
    protocol = PROTOCOL
    if len(files) > 1:
        for system in (own, chance):
            system["mean"] = {"f1": sum(system[name]["f1"] for name in names) / len(names)}
        protocol = protocol | {"mean": "of the files"}
    sizes = {f"examples_{name}": len(pairs) for name, pairs in zip(names, predictions.pairs, strict=True)}
    paper = PAPER if official(files) and not predictions.lost else {}
    if paper:
        protocol = protocol | {"in brackets": "the paper's figures, since these are POPE's three files of COCO"}
    title = "pope" if all("pope" in name for name in names) else "yes-or-no questions"
    return report(title, [predictions], own, protocol, chance, sizes if len(files) > 1 else {}, paper)


def official(files: Sequence[Pope]) -> bool:
    """Whether these are the three published files, whole."""
    sizes = {file.file.stem: len(file) for file in files if file.limit is None}
    return sizes.keys() == OFFICIAL.keys() and all(sizes[name] in OFFICIAL[name] for name in sizes)


def figures(texts: Sequence[str], labels: Sequence[bool]) -> Figures:
    """Figures of N answers in words, in percent; labels: whether yes is right."""
    yes = [says_yes(text) for text in texts]
    neither = [not text.lower().startswith(("yes", "no")) for text in texts]
    predicted, target = torch.tensor(yes).int(), torch.tensor(labels).int()  # (N,)
    found = {name: float(measure(predicted, target)) for name, measure in MEASURES.items()}
    shares = {"yes": sum(yes) / len(yes), "neither": sum(neither) / len(neither)}
    return {name: 100 * value for name, value in (found | shares).items()}


def says_yes(text: str) -> bool:
    """Whether POPE's script takes an answer for yes."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & {*words}


def coin(labels: Sequence[bool]) -> Figures:
    """Expected figures of a coin, in percent."""
    share = sum(labels) / len(labels)
    found = {"accuracy": 0.5, "precision": share, "recall": 0.5, "f1": share / (share + 0.5), "yes": 0.5, "neither": 0.0}
    return {name: 100 * value for name, value in found.items()}
