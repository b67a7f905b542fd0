"""Hungarian matching of queries and known objects, and the detection loss (Octopus section 3.3, equation 3).

Weights as in DETR (Carion et al., ECCV 2020): 1 for the class, 5 for L1, 2 for generalised IoU, 0.1 for the class NOTHING.
Octopus does not give its weights. The paper scores queries with one binary class; the three classes here are ours.
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
FAR = 1e4  # larger than any finite cost


@dataclass(frozen=True)
class Objects:
    """The known objects of a batch's images, first those that the answers point at.

    Attributes:
        boxes: (B, K, 4) centre x, centre y, width, height, relative to the image; zeros at padding.
        counts: B integers, known objects per image; at most as many as there are queries.
        meant: B integers, how many of them the answer points at.
    """

    boxes: Tensor
    counts: list[int]
    meant: list[int]

    def kinds(self, row: int) -> Tensor:
        """(counts[row],) int64: MEANT or OTHER."""
        return torch.tensor([MEANT] * self.meant[row] + [OTHER] * (self.counts[row] - self.meant[row]))

    def to(self, device: torch.device) -> Objects:
        """The same objects with the boxes on the device."""
        return Objects(self.boxes.to(device, non_blocking=True), self.counts, self.meant)


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, objects: Objects) -> Tensor:
    """Match one layer's queries to the objects, one to one, at the lowest cost (Hungarian): (B, K) int64 query numbers.

    logits (B, N, 3), boxes (B, N, 4). Padding holds 0. The assignment runs on the host.
    """
    likely, ours, theirs = logits.float().softmax(-1).cpu(), boxes.float().cpu(), objects.boxes.cpu()
    found = torch.zeros(theirs.shape[:2], dtype=torch.long)  # (B, K)
    for row, count in enumerate(objects.counts):
        if not count:
            continue
        there = theirs[row, :count]  # (count, 4)
        named = -likely[row][:, objects.kinds(row)]  # (N, count)
        apart = torch.cdist(ours[row], there, p=1)  # (N, count)
        overlap = -generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (ours[row], there)))
        cost = CLASS * named + L1 * apart + GIOU * overlap  # (N, count); NaN if training diverged
        queries, numbers = linear_sum_assignment(cost.nan_to_num(FAR, FAR, -FAR))
        found[row, torch.from_numpy(numbers)] = torch.from_numpy(queries)
    return found.to(logits.device)


def set_loss(found: Detections, objects: Objects) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The detection loss (equation 3), summed over the decoder layers, each with its own matching.

    Returns the loss, the last layer's matching (B, K), and the last layer's parts by name: class, l1, giou. Images without
    known objects are left out. As in DETR; the paper does not say whether inner layers have a loss.
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
        nothing = 0 * (logits.sum() + boxes.sum())  # a zero gradient, since DDP waits for one
        return {"class": nothing, "l1": nothing, "giou": nothing}
    rows = to_device([row for row in known for _ in range(objects.counts[row])], device)  # (M,), the image of each object
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
