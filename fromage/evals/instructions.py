"""Instructions as LLaVA writes them, and captions with boxes: answers that point at objects, and answers in text alone.

Protocol: figures by the number of objects that the right answer points at. A measure of ours, not of a paper.
"""

from __future__ import annotations

from collections import defaultdict

from fromage.evals.options import Options
from fromage.evals.predict import predict, report
from fromage.evals.report import Figures, Report
from fromage.octopus.examples import Example
from fromage.octopus.metrics import box_metrics, mean_percent
from fromage.octopus.model import Octopus
from fromage.octopus.sources import Flickr30kSpotting, Instructions

PROTOCOL = {
    "all_found": "as many boxes as there ought to be, and each the partner of one of these with an IoU from 0.5 on",
    "in_order": "the same, in the order of the data: the first box is the partner of the first one, and so on",
    "words": "whether the answer's words, boxes left out, are exactly those of the data",
}


def evaluate(model: Octopus, data: Instructions | Flickr30kSpotting, options: Options | None = None) -> Report:
    """Figures in percent: 'text', '1_object', '2_objects' and so on; and 'all', seconds per example.

    Raises UserError as predict does.
    """
    predictions = predict(model, [data], options)
    metrics: dict[str, list[Figures]] = defaultdict(list)
    for example, answer in sorted(predictions.pairs[0], key=lambda pair: len(pair[0].meant)):
        found = box_metrics(answer, example.target_boxes, example.words)
        metrics[setting(example)].append({name: found[name] for name in found if name in PROTOCOL})
    figures = {name: mean_percent(some) for name, some in metrics.items()} | {"all": {"seconds": predictions.seconds}}
    sizes = {f"answers_{name}": len(some) for name, some in metrics.items()}
    name = "spotting" if isinstance(data, Flickr30kSpotting) else "instructions"
    return report(name, [predictions], figures, PROTOCOL, sizes=sizes)


def setting(example: Example) -> str:
    """'text', '1_object', '2_objects' ..."""
    many = len(example.meant)
    return f"{many}_object{'s' if many > 1 else ''}" if many else "text"
