"""DETR's matching and its loss: which query is which known object, and how far off it is.

Weights as in DETR (Carion et al., ECCV 2020): 1 for the class, 5 for L1, 2 for generalised IoU, a tenth for NOTHING.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from fromage.models.packed_attention import to_device
from fromage.octopus.recognition import MEANT, NOTHING, OTHER, Detections

CLASS, L1, GIOU = 1.0, 5.0, 2.0
NOTHING_WEIGHT = 0.1
FAR = 1e4  # a cost beyond all others


@dataclass(frozen=True)
class Objects:
    """The known objects of a batch's images, those that an answer points at first. K: most of an image.

    Attributes:
        boxes: (B, K, 4) centre x, centre y, width, height, shares of the image; zeros where there is none.
        counts: B, how many there are; at most as many as there are queries.
        meant: B, how many of them the answer points at.
    """

    boxes: Tensor
    counts: list[int]
    meant: list[int]

    def kinds(self, row: int) -> Tensor:
        """(counts[row],) int64: MEANT or OTHER."""
        return torch.tensor([MEANT] * self.meant[row] + [OTHER] * (self.counts[row] - self.meant[row]))

    def to(self, device: torch.device) -> Objects:
        """With the boxes there."""
        return Objects(self.boxes.to(device, non_blocking=True), self.counts, self.meant)


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, objects: Objects) -> Tensor:
    """One layer's queries and the objects, one to one at the lowest cost (Hungarian): (B, K) int64 numbers of queries.

    logits (B, N, 3), boxes (B, N, 4). The places behind an image's objects hold 0. The assignment runs on the host.
    """
    likely, ours, theirs = logits.float().softmax(-1).cpu(), boxes.float().cpu(), objects.boxes.cpu()
    found = torch.zeros(theirs.shape[:2], dtype=torch.long)  # (B, K)
    for row, count in enumerate(objects.counts):
        if not count:
            continue
        there = theirs[row, :count]  # (count, 4)
        named = -likely[row][:, objects.kinds(row)]  # (N, count)
        apart = torch.cdist(ours[row], there, p=1)
        overlap = -generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (ours[row], there)))
        cost = CLASS * named + L1 * apart + GIOU * overlap  # (N, count); not a number where training has gone wrong
        queries, numbers = linear_sum_assignment(cost.nan_to_num(FAR, FAR, -FAR))
        found[row, torch.from_numpy(numbers)] = torch.from_numpy(queries)
    return found.to(logits.device)


def set_loss(found: Detections, objects: Objects) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss of every decoder layer against the objects, summed, each with a matching of its own.

    Returns the loss, the last layer's matching (B, K), and the last layer's parts by name: class, l1, giou. Images of
    which no object is known do not count.
    """
    total, parts, matched = found.relay.new_zeros((), dtype=torch.float32), {}, torch.empty(0)
    for logits, boxes in zip(found.logits, found.boxes, strict=True):
        matched = match(logits, boxes, objects)
        parts = _layer_loss(logits, boxes, matched, objects)
        total = total + CLASS * parts["class"] + L1 * parts["l1"] + GIOU * parts["giou"]
    return total, matched, parts


def _layer_loss(logits: Tensor, boxes: Tensor, matched: Tensor, objects: Objects) -> dict[str, Tensor]:
    device = logits.device
    known = [row for row, count in enumerate(objects.counts) if count]
    if not known:
        nothing = 0 * (logits.sum() + boxes.sum())  # a gradient of zero, which several devices wait for
        return {"class": nothing, "l1": nothing, "giou": nothing}
    rows = to_device([row for row in known for _ in range(objects.counts[row])], device)  # (M,), M objects of all images
    places = to_device([place for row in known for place in range(objects.counts[row])], device)  # (M,)
    queries = matched[rows, places]  # (M,)
    kinds = torch.full(logits.shape[:2], NOTHING, device=device)  # (B, N)
    kinds[rows, queries] = to_device(torch.cat([objects.kinds(row) for row in known]), device)
    weight = torch.ones(3, device=device)
    weight[NOTHING] = NOTHING_WEIGHT
    ours, theirs = boxes[rows, queries].float(), objects.boxes[rows, places]  # (M, 4) each
    apart = torch.diagonal(generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (ours, theirs))))
    return {
        "class": F.cross_entropy(logits[known].float().flatten(0, 1), kinds[known].flatten(), weight),
        "l1": F.l1_loss(ours, theirs, reduction="sum") / len(rows),
        "giou": (1 - apart).sum() / len(rows),
    }
