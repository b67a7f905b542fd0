"""RefCOCO, RefCOCO+ and RefCOCOg: which object do these words mean?

Protocol: an answer is right where the first box that it points at has an IoU of at least 0.5 with the object's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fromage.evals.options import Options
from fromage.evals.predict import listed, predict, report
from fromage.evals.report import Report, System
from fromage.octopus.answers import GroundedAnswer
from fromage.octopus.examples import Example
from fromage.octopus.metrics import (
    TOP,
    Areas,
    box_areas,
    box_metrics,
    chance_metrics,
    mask_areas,
    mask_percent,
    mean_percent,
)
from fromage.octopus.model import Octopus
from fromage.octopus.sources import RefCOCO
from fromage.octopus.sources.file_source import LOST_ANSWERS, NO_MASK, ODD_MASK, with_masks

PROTOCOL = {
    "acc_iou50, mean_iou": "of the first box that the answer points at; acc_iou50 counts it from an IoU of 0.5 on",
    "all_found": "whether the answer points at the right box and at no other",
    "chance": "to be expected of a random one of the image's known boxes",
}
HEAD = {
    "head_recall_top1 to 5": f"whether one of the DETR head's 1 to {TOP} boxes of highest score is right",
    "head_iou": "of the head's box of highest score",
}
MASKS = {
    "mask_ciou, mask_mean_iou": "of the mask of the first box that the answer points at, at the image's own size: "
    "the sum of intersections over the sum of unions of all examples, and the mean of each example's IoU",
    "box_ciou": "the same of that box, filled",
}
# Number of expressions of each official split (RefCOCO and RefCOCO+ as in refs(unc).p, RefCOCOg as in refs(umd).p), by which
# these files are known: no two have the same.
OFFICIAL = {
    ("val", 10834): "RefCOCO", ("testA", 5657): "RefCOCO", ("testB", 5095): "RefCOCO",
    ("val", 10758): "RefCOCO+", ("testA", 5726): "RefCOCO+", ("testB", 4889): "RefCOCO+",
    ("val", 4896): "RefCOCOg", ("test", 9602): "RefCOCOg",
}  # fmt: skip
SPLITS = [(name, split) for (split, _), name in OFFICIAL.items()]
ACCURACY = {  # of the Octopus paper, in the order of SPLITS
    "Octopus, 224 px": (88.77, 91.93, 82.28, 83.05, 88.87, 75.12, 83.11, 84.78),
    "Octopus, 336 px": (89.02, 92.63, 83.42, 83.55, 89.40, 76.02, 84.25, 86.19),
    "Shikra 7B, 224 px": (87.01, 90.61, 80.24, 81.60, 87.36, 72.12, 82.27, 82.19),
}
RECALL = {  # of its Table 5: the decoder's boxes of highest score
    ("Octopus, 224 px", "RefCOCOg", "val"): {"head_recall_top1": 81.93, "head_recall_top5": 94.56},
    ("Octopus, 336 px", "RefCOCOg", "val"): {"head_recall_top1": 82.13, "head_recall_top5": 95.95},
}
CIOU = {  # of its appendix B: referring segmentation, RefCOCO; it does not say at how many pixels
    ("RefCOCO", "val"): 63.6, ("RefCOCO", "testA"): 66.6, ("RefCOCO", "testB"): 61.3,
}  # fmt: skip


def evaluate(model: Octopus, data: RefCOCO | Sequence[RefCOCO], options: Options | None = None) -> Report:
    """Figures of one or several splits in percent, beside chance, and beside the paper's where the splits are official.

    Raises UserError as predict does.
    """
    splits = listed(data)
    if model.masks:
        with_masks(splits)
    areas = [Masks() for _ in splits]
    parts = [predict(model, [split], options, some.look) for split, some in zip(splits, areas, strict=True)]
    own: System = {}
    chance: System = {}
    for split, part, some in zip(splits, parts, areas, strict=True):
        pairs = [(example, answer, [example.boxes[i] for i in example.meant]) for example, answer in part.pairs[0]]
        own[split.split] = mean_percent([box_metrics(answer, wanted) for _, answer, wanted in pairs])
        own[split.split] |= some.figures() | {"seconds": part.seconds}
        chance[split.split] = mean_percent([chance_metrics(example.boxes, wanted) for example, _, wanted in pairs])
    protocol = PROTOCOL | (HEAD if model.num_queries else {}) | (MASKS if model.masks else {})
    names = {split.split: "" if part.lost else official(split) for split, part in zip(splits, parts, strict=True)}
    if any(names.values()):
        known = ", ".join(f"{split} has as many expressions as {name}'s" for split, name in names.items() if name)
        protocol |= {"in brackets": f"the paper's figures, since {known}"}
    if splits[0].match.pattern:
        protocol |= {"expressions": f"those alone in which {splits[0].match.pattern!r} is found"}
    sizes = {f"examples_{split.split}": len(part.pairs[0]) for split, part in zip(splits, parts, strict=True)}
    masked = {s.split for s in splits if model.masks and not s.dropped[NO_MASK] + s.dropped[ODD_MASK]}
    return report("refcoco", parts, own, protocol, chance, sizes if len(splits) > 1 else {}, published(names, masked))


class Masks:
    """Figures of the masks of answers, which pass through; none where no mask is known."""

    def __init__(self) -> None:
        self.masks: list[Areas] = []
        self.boxes: list[Areas] = []

    def look(self, example: Example, answer: GroundedAnswer) -> None:
        """Measure one answer."""
        for wanted in filter(None, example.masks):
            self.masks.append(mask_areas(answer, wanted))
            self.boxes.append(box_areas(answer, wanted))

    def figures(self) -> dict[str, float]:
        """In percent."""
        if not self.masks:
            return {}
        ours = {f"mask_{name}": value for name, value in mask_percent(self.masks).items()}
        return ours | {"box_ciou": mask_percent(self.boxes)["ciou"]}


def official(split: RefCOCO) -> str:
    """The data set whose official split this is, whole; '' for any other."""
    if split.limit is not None or split.match.pattern:
        return ""
    left_out = sum(count for what, count in split.dropped.items() if what in (LOST_ANSWERS, "expressions without words"))
    return OFFICIAL.get((split.split, len(split) + left_out), "")


def published(names: dict[str, str], masked: Collection[str] = ()) -> dict[str, System]:
    """The paper's figures of splits, by system and split; names: of the data set of each split, '' for an unknown one.

    masked: splits all of whose masks are known and measured: their figures of masks too.
    """
    boxes = {
        who: {
            split: {"acc_iou50": figures[SPLITS.index((name, split))], **RECALL.get((who, name, split), {})}
            for split, name in names.items()
            if name
        }
        for who, figures in ACCURACY.items()
    }
    segmented = {
        split: {"mask_ciou": CIOU[name, split]} for split, name in names.items() if split in masked and (name, split) in CIOU
    }
    return boxes | ({"Octopus, masks": segmented} if segmented else {})
