"""RefCOCO, RefCOCO+ and RefCOCOg: which object do these words mean?

Protocol: an answer is right where the first box that it points at has an IoU of at least 0.5 with the object's.
"""

from __future__ import annotations

from fromage.evals.predict import predict
from fromage.evals.report import Report
from fromage.octopus.metrics import TOP, box_metrics, chance_metrics, mean_percent
from fromage.octopus.model import Octopus
from fromage.octopus.sources import RefCOCO
from fromage.retrieval.encode import Options

PROTOCOL = {
    "acc_iou50, mean_iou": "of the first box that the answer points at; acc_iou50 counts it from an IoU of 0.5 on",
    "all_found": "whether the answer points at the right box and at no other",
    "chance": "to be expected of a random one of the image's known boxes",
}
HEAD = {
    "head_top1, head_iou": "accuracy and IoU of the box with the DETR head's highest score, whatever the answer",
    f"head_recall_top{TOP}": f"whether one of the {TOP} with the highest scores is right",
}


def evaluate(model: Octopus, data: RefCOCO, options: Options | None = None) -> Report:
    """Figures of the split in percent, beside chance. Raises UserError as predict does."""
    predictions = predict(model, data, options)
    own, chance = [], []
    for example, answer in predictions.pairs:
        wanted = [example.boxes[i] for i in example.meant]
        own.append(box_metrics(answer, wanted))
        chance.append(chance_metrics(example.boxes, wanted))
    protocol = PROTOCOL | (HEAD if model.num_queries else {})
    if data.match.pattern:
        protocol |= {"expressions": f"those alone in which {data.match.pattern!r} is found"}
    figures, expected = ({data.split: mean_percent(metrics)} for metrics in (own, chance))
    return predictions.report("refcoco", figures, protocol, expected)
