"""Hungarian matching of queries and known objects, and the detection loss (Octopus section 3.3, equation 3).

Weights as in DETR (Carion et al., ECCV 2020): 1 for the score, 5 for L1, 2 for generalised IoU. Octopus gives none. Masks
have a loss (fromage.octopus.masks), but no part in the matching.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert

from fromage.models.packed_layout import to_device
from fromage.octopus.masks import DICE, MASK, mask_losses
from fromage.octopus.recognition import Detections
from fromage.training.losses import device_weight

SCORE, L1, GIOU = 1.0, 5.0, 2.0
FAR = 1e4  # larger than any finite cost


@dataclass(frozen=True)
class Objects:
    """The objects that the prompts of a batch are about: the foreground.

    Attributes:
        boxes: (E, K, 4) centre x, centre y, width, height, relative to the image; zeros at padding.
        counts: E integers, objects per prompt; at most as many as there are queries. 0: they are not known.
        masks: (M, H, W), of those objects whose mask is known the share of each cell that it covers; None: not asked for.
        masked: (2, M) int64, their prompt and their place among its objects.
    """

    boxes: Tensor
    counts: list[int]
    masks: Tensor | None = None
    masked: Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = True) -> Objects:
        """The same objects with boxes and masks on the device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Objects:
        """The same objects in memory from which a device copies by itself; a loader asks for it."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Objects:
        changed = [tensor if tensor is None else change(tensor) for tensor in (self.boxes, self.masks, self.masked)]
        return Objects(changed[0], self.counts, *changed[1:])  # type: ignore[arg-type]


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, objects: Objects) -> Tensor:
    """Match each layer's queries to the objects, one to one, at the lowest cost (Hungarian): (..., E, K) query numbers.

    logits (..., E, N), boxes (..., E, N, 4). Padding holds 0. The assignment runs on the host, which waits once.
    """
    l1, giou = pairwise_distances(boxes.float(), objects.boxes)  # (..., E, N, K) each
    cost = L1 * l1 + GIOU * giou - SCORE * logits.float().sigmoid().unsqueeze(-1)  # (..., E, N, K)
    cost = cost.nan_to_num(FAR, FAR, -FAR).cpu()  # NaN if training diverged
    found = torch.zeros(*cost.shape[:-2], cost.shape[-1], dtype=torch.long)  # (..., E, K)
    rows = zip(cost.flatten(0, -3), found.flatten(0, -2), cycle(objects.counts))  # (N, K), (K,), of each layer and prompt
    for of_row, found_row, count in rows:
        queries, numbers = linear_sum_assignment(of_row[:, :count])
        found_row[torch.from_numpy(numbers)] = torch.from_numpy(queries)
    return found.to(logits.device)


Matcher = Callable[[Tensor, Tensor, Objects], Tensor]  # as `match`


def box_distances(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 4) and (..., 4) boxes, broadcast -> L1 distance and 1 - GIoU (Rezatofighi et al., CVPR 2019), (...) each.

    torchvision's is of all pairs within one image; this one serves whole batches, and pairs alone.
    """
    a, b = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (ours, theirs))  # (..., 4)
    low, high = torch.minimum(a, b), torch.maximum(a, b)  # (..., 4)
    inner = _area((low[..., 2:] - high[..., :2]).clamp(min=0))  # (...), of the intersection
    union = _area(ours[..., 2:]) + _area(theirs[..., 2:]) - inner  # (...)
    hull = _area(high[..., 2:] - low[..., :2])  # (...), of the smallest box around both
    return (ours - theirs).abs().sum(-1), 2 - inner / union - union / hull


def _area(sides: Tensor) -> Tensor:
    """(..., 2) -> (...)."""
    return sides[..., 0] * sides[..., 1]


def pairwise_distances(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """(..., N, 4) and (..., K, 4) boxes -> L1 distances and 1 - GIoU, (..., N, K) each."""
    return box_distances(ours.unsqueeze(-2), theirs.unsqueeze(-3))


@torch.no_grad()
def nearest(boxes: Tensor, objects: Objects) -> Tensor:
    """The query with the nearest box to each object, by L1 + 1 - GIoU (equation 4): (E, K) int64; padding holds any.

    boxes (E, N, 4) of this step. Two objects can have the same query.
    """
    l1, giou = pairwise_distances(boxes.float(), objects.boxes)  # (E, N, K) each
    return (l1 + giou).argmin(-2)  # (E, K)


def detection_loss(found: Detections, objects: Objects, matcher: Matcher = match) -> tuple[Tensor, dict[str, Tensor]]:
    """The detection loss (equation 3), summed over the decoder layers, each with its own matching by matcher.

    Returns the loss, and the last layer's parts by name: score, l1, giou; where there are masks, mask and dice too, of the
    last layer alone. Prompts whose objects are not known are left out, and objects whose mask is not known. As in DETR it is
    divided by the number of objects on all devices that train together (`device_weight`); batches whose gradients are
    accumulated have means of their own. The paper does not say whether inner layers have a loss.
    """
    matched = matcher(found.logits, found.boxes, objects)  # (L, E, K)
    of_layers = _losses(found.logits, found.boxes, matched, objects)
    weight = device_weight(sum(objects.counts), found.logits.device)
    of_layers = {name: weight * each for name, each in of_layers.items()}
    total = SCORE * of_layers["score"].sum() + L1 * of_layers["l1"].sum() + GIOU * of_layers["giou"].sum()
    parts = {name: each[-1] for name, each in of_layers.items()}
    if found.masks is not None and objects.masks is not None and objects.masked is not None:
        rows, places = objects.masked  # (M,) each
        of_masks = mask_losses(found.masks[rows, matched[-1, rows, places]], objects.masks)
        weight = device_weight(len(objects.masks), found.logits.device)
        parts |= {name: weight * each for name, each in of_masks.items()}
        total = total + MASK * parts["mask"] + DICE * parts["dice"]
    return total, parts


def _losses(logits: Tensor, boxes: Tensor, matched: Tensor, objects: Objects) -> dict[str, Tensor]:
    """(L, E, N), (L, E, N, 4), (L, E, K) -> score, l1 and giou, (L,) each."""
    device = logits.device
    listed = [(row, place) for row, count in enumerate(objects.counts) for place in range(count)]
    if not listed:
        nothing = 0 * (logits.sum((1, 2)) + boxes.sum((1, 2, 3)))  # a zero gradient, since DDP waits for one
        return {"score": nothing, "l1": nothing, "giou": nothing}
    rows, places = to_device(torch.tensor(listed).T, device)  # (M,) each: the prompt of an object, and its place there
    known = to_device([row for row, count in enumerate(objects.counts) if count], device)
    layers = torch.arange(len(logits), device=device).unsqueeze(1)  # (L, 1)
    queries = matched[:, rows, places]  # (L, M)
    foreground = torch.zeros_like(logits, dtype=torch.float32)  # (L, E, N)
    foreground[layers, rows, queries] = 1.0
    l1, giou = box_distances(boxes[layers, rows, queries].float(), objects.boxes[rows, places])  # (L, M) each
    score = F.binary_cross_entropy_with_logits(
        logits[:, known].float(), foreground[:, known], reduction="none"
    )  # (L, E', N)
    return {"score": score.sum((1, 2)) / len(listed), "l1": l1.mean(1), "giou": giou.mean(1)}
