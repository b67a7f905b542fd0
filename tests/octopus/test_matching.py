import itertools
from dataclasses import replace

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

from fromage.octopus.masks import DICE, MASK, mask_losses
from fromage.octopus.matching import GIOU, L1, SCORE, Objects, box_distances, detection_loss, match, nearest
from fromage.octopus.recognition import Detections, Recognizer


def some(B=3, N=4, counts=(2, 4, 1), L=2):
    torch.manual_seed(0)
    boxes = torch.zeros(B, max(counts), 4)
    for row, count in zip(boxes, counts, strict=True):
        row[:count] = torch.rand(count, 4) * 0.5 + 0.2
    found = Detections(torch.randn(L, B, N), torch.rand(L, B, N, 4) * 0.5 + 0.2, torch.zeros(B, N, 8))
    return found, Objects(boxes, list(counts))


def cost(logits, boxes, objects, row, query, place):
    ours, theirs = boxes[row, query], objects.boxes[row, place]
    iou = generalized_box_iou(*(box_convert(b[None], "cxcywh", "xyxy") for b in (ours, theirs)))
    return float(SCORE * -logits[row, query].sigmoid() + L1 * (ours - theirs).abs().sum() - GIOU * iou)


def test_the_matching_is_the_cheapest_of_all():
    found, objects = some()
    logits, boxes = found.logits[-1], found.boxes[-1]
    matched = match(logits, boxes, objects)
    for row, count in enumerate(objects.counts):

        def total(queries, row=row):
            return sum(cost(logits, boxes, objects, row, query, place) for place, query in enumerate(queries))

        best = min(itertools.permutations(range(4), count), key=total)
        assert matched[row, :count].tolist() == list(best)


def test_all_layers_are_matched_at_once_as_each_alone():
    found, objects = some(L=3)
    each = [match(logits, boxes, objects) for logits, boxes in zip(found.logits, found.boxes, strict=True)]
    assert torch.equal(match(found.logits, found.boxes, objects), torch.stack(each))


@pytest.mark.parametrize("theirs", [[0.5, 0.5, 0.2, 0.2], [0.52, 0.5, 0.2, 0.4], [0.9, 0.1, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1]])
def test_pairs_are_as_far_apart_as_torchvision_has_them(theirs):
    ours, theirs = torch.tensor([0.5, 0.5, 0.2, 0.2]), torch.tensor(theirs)
    l1, giou = box_distances(ours, theirs)
    pair = (box_convert(box[None], "cxcywh", "xyxy") for box in (ours, theirs))
    torch.testing.assert_close(giou, 1 - generalized_box_iou(*pair)[0, 0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(l1, torch.nn.functional.l1_loss(ours, theirs, reduction="sum"))


def test_what_is_not_a_number_is_matched_and_shows_in_the_loss():
    found, objects = some()
    boxes = found.boxes.clone()
    boxes[:, 1] = torch.nan
    assert detection_loss(replace(found, boxes=boxes), objects)[0].isnan()
    assert len({*match(found.logits[-1], boxes[-1], objects)[1].tolist()}) == 4


def test_one_image_is_matched_as_in_a_batch():
    found, objects = some()
    whole = match(found.logits[0], found.boxes[0], objects)
    for row in range(3):
        one = Objects(objects.boxes[row : row + 1], objects.counts[row : row + 1])
        alone = match(found.logits[0, row : row + 1], found.boxes[0, row : row + 1], one)
        assert torch.equal(alone[0], whole[row])


def test_what_is_right_costs_nothing_for_boxes_and_little_for_the_score():
    _, objects = some(counts=(2, 4, 1))
    boxes, logits = torch.rand(1, 3, 4, 4), torch.full((1, 3, 4), -20.0)
    order = [3, 1, 0, 2]
    for row, count in enumerate(objects.counts):
        for place in range(count):
            boxes[0, row, order[place]] = objects.boxes[row, place]
            logits[0, row, order[place]] = 20.0
    loss, parts = detection_loss(Detections(logits, boxes, torch.zeros(3, 4, 8)), objects)
    assert float(loss) < 1e-4 and all(float(value) < 1e-4 for value in parts.values())
    assert match(logits[0], boxes[0], objects)[1].tolist() == order


def test_the_target_of_an_index_token_is_the_nearest_box_whatever_its_score():
    found, objects = some()
    got = nearest(found.boxes[-1], objects)
    for row, count in enumerate(objects.counts):
        for place in range(count):
            theirs, gaps = objects.boxes[row, place], []
            for ours in found.boxes[-1, row]:
                iou = generalized_box_iou(*(box_convert(b[None], "cxcywh", "xyxy") for b in (ours, theirs)))
                gaps.append(float((ours - theirs).abs().sum() + 1 - iou))
            assert int(got[row, place]) == gaps.index(min(gaps))
    twins = Objects(objects.boxes[:, :1].repeat(1, 2, 1), [2, 2, 2])
    assert (nearest(found.boxes[-1], twins)[:, 0] == nearest(found.boxes[-1], twins)[:, 1]).all()
    assert nearest(found.boxes[-1], Objects(torch.zeros(3, 0, 4), [0, 0, 0])).shape == (3, 0)


def test_images_of_which_nothing_is_known_do_not_count():
    found, objects = some()
    empty = Objects(torch.zeros(3, 0, 4), [0, 0, 0])
    boxes = found.boxes.clone().requires_grad_()
    loss, _ = detection_loss(replace(found, boxes=boxes), empty)
    loss.backward()
    assert float(loss) == 0 and boxes.grad.abs().sum() == 0
    more = Objects(torch.cat([objects.boxes, torch.zeros(1, 4, 4)]), [*objects.counts, 0])
    wider = Detections(*(torch.cat([x, x[:, :1]], 1) for x in (found.logits, found.boxes)), found.relay)
    torch.testing.assert_close(detection_loss(wider, more)[0], detection_loss(found, objects)[0])


def test_masks_are_judged_by_those_of_their_matched_objects_where_they_are_known():
    found, objects = some()
    torch.manual_seed(1)
    found = replace(found, masks=torch.randn(3, 4, 6, 7, requires_grad=True))
    wanted, places = torch.rand(2, 6, 7), torch.tensor([[0, 1], [1, 3]])  # the first image's second, the second's fourth
    plain, parts = detection_loss(found, objects)
    assert parts.keys() == {"score", "l1", "giou"}
    loss, parts = detection_loss(found, replace(objects, masks=wanted, masked=places))
    matched = match(found.logits[-1], found.boxes[-1], objects)
    queries = [int(matched[0, 1]), int(matched[1, 3])]
    theirs = mask_losses(torch.stack([found.masks[0, queries[0]], found.masks[1, queries[1]]]), wanted)
    assert all(torch.equal(parts[name], value) for name, value in theirs.items())
    torch.testing.assert_close(loss, plain + MASK * theirs["mask"] + DICE * theirs["dice"])
    loss.backward()
    moved = found.masks.grad.flatten(2).abs().sum(-1).nonzero().tolist()
    assert moved == [[0, queries[0]], [1, queries[1]]]


def test_every_layer_is_judged():
    found, objects = some()
    logits, boxes = found.logits.requires_grad_(), found.boxes.requires_grad_()
    detection_loss(replace(found, logits=logits, boxes=boxes), objects)[0].backward()
    assert (logits.grad.flatten(1).norm(dim=1) > 0).all() and (boxes.grad.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("grid", [(2, 2), (3, 5)])
def test_boxes_lie_in_the_image_and_start_from_the_queries_points(grid):
    torch.manual_seed(0)
    recognizer = Recognizer(8, 6, grid, 5, decoder_width=16, layers=2, heads=2)
    found = recognizer(torch.randn(2, 5, 8), torch.randn(2, grid[0] * grid[1], 6), torch.arange(2))
    assert found.boxes.shape == (2, 2, 5, 4) and found.logits.shape == (2, 2, 5) and found.relay.shape == (2, 5, 8)
    assert ((found.boxes > 0) & (found.boxes < 1)).all() and ((found.corners >= 0) & (found.corners <= 1)).all()
    torch.nn.init.zeros_(recognizer.box[-2].weight)
    torch.nn.init.zeros_(recognizer.box[-2].bias)
    at = recognizer(torch.randn(2, 5, 8), torch.randn(2, grid[0] * grid[1], 6), torch.arange(2)).boxes[-1][..., :2]
    torch.testing.assert_close(at, recognizer.points.sigmoid().expand(2, -1, -1))


def test_the_places_of_patches_tell_them_apart():
    places = Recognizer(8, 6, (3, 5), 2, decoder_width=32, layers=1, heads=2).patch_encoding
    assert torch.cdist(places, places).add(torch.eye(15) * 9).min() > 0.3


def test_score_and_box_are_functions_of_the_relayed_state():
    """A linear probe on what is relayed gives the score exactly, and the decoder's output, from which the box is made."""
    torch.manual_seed(0)
    recognizer = Recognizer(32, 6, (3, 5), 5, decoder_width=16, layers=2, heads=2)
    found = recognizer(torch.randn(7, 5, 32), torch.randn(3, 15, 6), torch.tensor([0, 0, 1, 1, 1, 2, 2]))
    read = (found.relay - recognizer.leave.bias) @ torch.linalg.pinv(recognizer.leave.weight).T  # (B, N, d) -> (B, N, c)
    torch.testing.assert_close(recognizer.score(read).squeeze(-1), found.logits[-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(recognizer._boxes(read), found.boxes[-1], atol=1e-4, rtol=1e-4)
