"""Hungarian matching of queries and known objects, and the detection loss (Octopus section 3.3, equation 3).

Weights as in DETR (Carion et al., ECCV 2020): 1 for the score, 5 for L1, 2 for generalised IoU. Octopus gives none. Masks
have a loss (fromage.octopus.masks), but no part in the matching.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from fromage.models.packed_attention import to_device
from fromage.octopus.masks import DICE, MASK, mask_losses
from fromage.octopus.recognition import Detections

SCORE, L1, GIOU = 1.0, 5.0, 2.0
FAR = 1e4  # larger than any finite cost


@dataclass(frozen=True)
class Objects:
    """The objects that the prompts of a batch are about: the foreground.

    Attributes:
        boxes: (B, K, 4) centre x, centre y, width, height, relative to the image; zeros at padding.
        counts: B integers, objects per image; at most as many as there are queries. 0: they are not known.
        masks: (M, H, W), of those objects whose mask is known the share of each cell that it covers; None: not asked for.
        masked: (2, M) int64, their image and their place among its objects.
    """

    boxes: Tensor
    counts: list[int]
    masks: Tensor | None = None
    masked: Tensor | None = None

    def to(self, device: torch.device) -> Objects:
        """The same objects with boxes and masks on the device."""
        moved = [t if t is None else t.to(device, non_blocking=True) for t in (self.boxes, self.masks, self.masked)]
        return Objects(moved[0], self.counts, *moved[1:])  # type: ignore[arg-type]


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, objects: Objects) -> Tensor:
    """Match one layer's queries to the objects, one to one, at the lowest cost (Hungarian): (B, K) int64 query numbers.

    logits (B, N), boxes (B, N, 4). Padding holds 0. The assignment runs on the host.
    """
    likely, ours, theirs = logits.float().sigmoid().cpu(), boxes.float().cpu(), objects.boxes.cpu()
    found = torch.zeros(theirs.shape[:2], dtype=torch.long)  # (B, K)
    for row, count in enumerate(objects.counts):
        if not count:
            continue
        l1, giou = distances(ours[row], theirs[row, :count])  # (N, count) each
        cost = L1 * l1 + GIOU * giou - SCORE * likely[row].unsqueeze(1)  # (N, count); NaN if training diverged
        queries, numbers = linear_sum_assignment(cost.nan_to_num(FAR, FAR, -FAR))
        found[row, torch.from_numpy(numbers)] = torch.from_numpy(queries)
    return found.to(logits.device)


Matcher = Callable[[Tensor, Tensor, Objects], Tensor]  # as `match`


def distances(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """(..., N, 4) and (..., K, 4) boxes -> L1 distances and 1 - GIoU, (..., N, K) each."""
    corners = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (ours, theirs))
    return torch.cdist(ours, theirs, p=1), 1 - generalized_box_iou(*corners)


@torch.no_grad()
def nearest(boxes: Tensor, objects: Objects) -> Tensor:
    """The query with the nearest box to each object, by L1 + 1 - GIoU (equation 4): (B, K) int64; padding holds any.

    boxes (B, N, 4) of this step. Two objects can have the same query.
    """
    if not objects.boxes.shape[1]:
        return torch.zeros(len(boxes), 0, dtype=torch.long, device=boxes.device)
    pairs = [distances(ours.float(), theirs) for ours, theirs in zip(boxes, objects.boxes, strict=True)]  # (N, K) each
    return torch.stack([(l1 + giou).argmin(0) for l1, giou in pairs])  # (B, K)


def detection_loss(found: Detections, objects: Objects, matcher: Matcher = match) -> tuple[Tensor, dict[str, Tensor]]:
    """The detection loss (equation 3), summed over the decoder layers, each with its own matching by matcher.

    Returns the loss, and the last layer's parts by name: score, l1, giou; where there are masks, mask and dice too, of the
    last layer alone. Images whose objects are not known are left out, and objects whose mask is not known.
    As in DETR; the paper does not say whether inner layers have a loss.
    """
    total, parts = found.relay.new_zeros((), dtype=torch.float32), {}
    for logits, boxes in zip(found.logits, found.boxes, strict=True):
        matched = matcher(logits, boxes, objects)  # (B, K)
        parts = _layer_loss(logits, boxes, matched, objects)
        total = total + SCORE * parts["score"] + L1 * parts["l1"] + GIOU * parts["giou"]
    if found.masks is not None and objects.masks is not None and objects.masked is not None:
        rows, places = objects.masked  # (M,) each
        parts |= mask_losses(found.masks[rows, matched[rows, places]], objects.masks)
        total = total + MASK * parts["mask"] + DICE * parts["dice"]
    return total, parts


def _layer_loss(logits: Tensor, boxes: Tensor, matched: Tensor, objects: Objects) -> dict[str, Tensor]:
    device = logits.device
    known = [row for row, count in enumerate(objects.counts) if count]
    if not known:
        nothing = 0 * (logits.sum() + boxes.sum())  # a zero gradient, since DDP waits for one
        return {"score": nothing, "l1": nothing, "giou": nothing}
    rows = to_device([row for row in known for _ in range(objects.counts[row])], device)  # (M,), the image of each object
    places = to_device([place for row in known for place in range(objects.counts[row])], device)  # (M,)
    queries = matched[rows, places]  # (M,)
    foreground = torch.zeros_like(logits, dtype=torch.float32)  # (B, N)
    foreground[rows, queries] = 1.0
    ours, theirs = boxes[rows, queries].float(), objects.boxes[rows, places]  # (M, 4) each
    giou = torch.diagonal(generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (ours, theirs))))  # (M,)
    return {
        "score": F.binary_cross_entropy_with_logits(logits[known].float(), foreground[known], reduction="sum") / len(rows),
        "l1": F.l1_loss(ours, theirs, reduction="sum") / len(rows),
        "giou": (1 - giou).sum() / len(rows),
    }
