"""How well an answer points: by the boxes it names, and by the DETR head's scores alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou

from fromage.octopus.answers import GroundedAnswer
from fromage.octopus.examples import Box
from fromage.octopus.masks import at_size
from fromage.octopus.segments import Mask

FOUND = 0.5  # IoU from which a box counts as found, as in RefCOCO's measure
TOP = 5  # of the head's candidates


def box_metrics(answer: GroundedAnswer, wanted: Sequence[Box], words: str = "") -> dict[str, float]:
    """Metrics of one answer that ought to point at the wanted boxes, 0 to 1.

    With one wanted box, as RefCOCO measures it:
        acc_iou50, mean_iou: of the first box pointed at.
        head_recall_top1 to 5: whether one of the head's 1 to 5 boxes of highest score is found, whatever the answer; none
        where there is no head. head_iou: of the first of them.
    With one or more:
        all_found: as many boxes as wanted, and each with a partner of IoU 0.5.
    With several:
        in_order: the same, where the partner of the first is the first wanted one, and so on.
    With words:
        words: whether the answer's words are these.
    """
    metrics: dict[str, float] = {}
    if len(wanted) == 1:
        first = float(overlaps(answer.boxes[:1], wanted).sum())  # IoU; without a box, 0
        metrics["acc_iou50"] = float(first >= FOUND)
        heads = overlaps([box for box, _ in answer.candidates[:TOP]], wanted)[:, 0]  # (5,), best score first
        if len(heads):
            metrics |= {f"head_recall_top{k}": float(heads[:k].max() >= FOUND) for k in range(1, TOP + 1)}
        metrics["mean_iou"] = first
        if len(heads):
            metrics["head_iou"] = float(heads[0])
    if wanted:
        metrics["all_found"] = float(all_found(answer.boxes, wanted))
    if len(wanted) > 1:
        metrics["in_order"] = float(in_order(answer.boxes, wanted))
    if words:
        metrics["words"] = float(answer.words == " ".join(words.split()))
    return metrics


def chance_metrics(known: Sequence[Box], wanted: Sequence[Box]) -> dict[str, float]:
    """acc_iou50 and mean_iou, 0 to 1, expected of a random one of the known boxes, where a single one is wanted."""
    reached = overlaps(known, wanted)[:, 0]  # (K,)
    return {"acc_iou50": float((reached >= FOUND).float().mean()), "mean_iou": float(reached.mean())}


class Areas(NamedTuple):
    """What an answer's mask and the right one both cover, and what at least one of them does, in pixels of the image."""

    both: int
    either: int

    @property
    def iou(self) -> float:
        """Intersection over union, 0 to 1."""
        return self.both / self.either


def mask_areas(answer: GroundedAnswer, wanted: Mask) -> Areas:
    """Of the mask of the first box pointed at; none covers nothing."""
    height, width = wanted.size
    return _areas(at_size(answer.masks[0], width, height) if answer.masks else None, wanted)


def box_areas(answer: GroundedAnswer, wanted: Mask) -> Areas:
    """The same of the first box pointed at, filled, as a mask: what a head has to surpass."""
    height, width = wanted.size
    filled = torch.zeros(wanted.size, dtype=torch.bool)
    for left, top, right, bottom in answer.boxes[:1]:
        filled[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = True
    return _areas(filled, wanted)


def _areas(ours: Tensor | None, wanted: Mask) -> Areas:
    theirs = torch.from_numpy(wanted.pixels())  # (h, w)
    ours = torch.zeros_like(theirs) if ours is None else ours
    return Areas(int((ours & theirs).sum()), int((ours | theirs).sum()))


def mask_percent(areas: Sequence[Areas]) -> dict[str, float]:
    """In percent: ciou, the sum of intersections over the sum of unions; mean_iou, the mean of each mask's IoU."""
    both, either = (sum(column) for column in zip(*areas, strict=True))
    return {"ciou": 100 * both / either, "mean_iou": 100 * sum(one.iou for one in areas) / len(areas)}


def all_found(boxes: Sequence[Box], wanted: Sequence[Box]) -> bool:
    """Whether boxes and wanted ones are partners, one to one, of IoU 0.5."""
    if len(boxes) != len(wanted):
        return False
    found = (overlaps(boxes, wanted) >= FOUND).numpy()
    return bool(found[linear_sum_assignment(~found)].all())


def in_order(boxes: Sequence[Box], wanted: Sequence[Box]) -> bool:
    """Whether there are as many boxes as wanted, and each has an IoU of 0.5 with the wanted one of its place."""
    return len(boxes) == len(wanted) and bool((overlaps(boxes, wanted).diagonal() >= FOUND).all())


def overlaps(boxes: Sequence[Box], wanted: Sequence[Box]) -> Tensor:
    """(len(boxes), len(wanted)) IoU."""
    return box_iou(torch.tensor(boxes).view(-1, 4), torch.tensor(wanted).view(-1, 4))


def mean_percent(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means in percent, of each metric over the answers that have it; mean_iou and head_iou too."""
    names = dict.fromkeys(name for one in metrics for name in one)
    return {
        name: 100 * sum(one[name] for one in metrics if name in one) / sum(name in one for one in metrics) for name in names
    }
