"""RefCOCO, RefCOCO+ and RefCOCOg: which object do these words mean?"""

from __future__ import annotations

from typing import Any

from fromage.evals.predict import ask
from fromage.octopus.metrics import TOP, averaged, guess, judge
from fromage.octopus.model import Octopus
from fromage.octopus.sources import RefCOCO
from fromage.retrieval.encode import Options

PROTOCOL = {
    "acc_iou50, mean_iou": "of the first box that the answer points at; acc_iou50 counts it from an IoU of 0.5 on",
    "all_found": "whether the answer points at the right box and at no other",
    "chance": "to be expected of a random one of the image's known boxes",
}
HEAD = {
    "head_top1, head_iou": "likewise, of the box with the DETR head's highest score, whatever the answer",
    f"head_recall_top{TOP}": f"whether one of the {TOP} with the highest scores is right",
}


def evaluate(model: Octopus, data: RefCOCO, options: Options | None = None) -> dict[str, Any]:
    """Figures of the split, beside chance. Raises UserError as ask does."""
    asked = ask(model, data, options or Options())
    own, chance = [], []
    for example, answer in asked.answered:
        wanted = [example.boxes[i] for i in example.meant]
        own.append(judge(answer, wanted))
        chance.append(guess(example.boxes, wanted))
    systems = ({data.split: averaged(figures)} for figures in (own, chance))
    protocol = PROTOCOL | (HEAD if model.num_queries else {})
    if data.match.pattern:
        protocol |= {"expressions": f"those alone in which {data.match.pattern!r} is found"}
    return asked.report("refcoco", next(systems), protocol, next(systems))
