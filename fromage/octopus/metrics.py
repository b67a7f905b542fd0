"""How well boxes were pointed at: by the answer, and by the DETR head's scores alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou

from fromage.octopus.answers import Grounded
from fromage.octopus.examples import Box

RIGHT = 0.5  # IoU from which a box counts as found
TOP = 5  # of the head's candidates


def judge(answer: Grounded, wanted: Sequence[Box], words: str = "") -> dict[str, float]:
    """Figures of one answer that ought to point at the wanted boxes, 0 to 1; what cannot be judged is left out.

    acc_iou50 and mean_iou: of the first box pointed at against the wanted one, where a single one is wanted (RefCOCO's
    measure). all_found: as many boxes as wanted, and each with a partner of IoU 0.5. head_top1: the highest score's box in
    place of the answer's; head_recall_top5: whether one of the five is right. words: whether they are those that are due.
    """
    figures: dict[str, float] = {}
    if len(wanted) == 1:
        first = overlaps(answer.boxes[:1], wanted)  # (1 or 0, 1)
        best = float(first.max()) if first.numel() else 0.0
        figures |= {"acc_iou50": float(best >= RIGHT), "mean_iou": best}
        if answer.candidates:
            heads = overlaps([box for box, _ in answer.candidates], wanted)[:, 0]  # (N,), best score first
            figures |= {"head_top1": float(heads[0] >= RIGHT), "head_iou": float(heads[0])}
            figures["head_recall_top5"] = float(heads[:TOP].max() >= RIGHT)
    if wanted:
        figures["all_found"] = float(all_found(answer.boxes, wanted))
    if words:
        figures["words"] = float(answer.words == " ".join(words.split()))
    return figures


def guess(known: Sequence[Box], wanted: Sequence[Box]) -> dict[str, float]:
    """Figures to be expected of a random one of the known boxes, where a single one is wanted."""
    reached = overlaps(known, wanted)[:, 0]  # (K,)
    return {"acc_iou50": float((reached >= RIGHT).float().mean()), "mean_iou": float(reached.mean())}


def all_found(boxes: Sequence[Box], wanted: Sequence[Box]) -> bool:
    """Whether boxes and wanted ones are partners, one to one, of IoU 0.5."""
    if len(boxes) != len(wanted):
        return False
    right = (overlaps(boxes, wanted) >= RIGHT).numpy()
    return bool(right[linear_sum_assignment(~right)].all())


def overlaps(boxes: Sequence[Box], wanted: Sequence[Box]) -> Tensor:
    """(len(boxes), len(wanted)) IoU."""
    return box_iou(torch.tensor(boxes).view(-1, 4), torch.tensor(wanted).view(-1, 4))


def averaged(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means in percent over the answers that have the figure; mean_iou and head_iou too."""
    names = dict.fromkeys(name for one in figures for name in one)
    return {
        name: 100 * sum(one[name] for one in figures if name in one) / sum(name in one for one in figures) for name in names
    }
