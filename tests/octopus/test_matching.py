import itertools
from dataclasses import replace

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

from fromage.octopus.matching import CLASS, GIOU, L1, Objects, match, set_loss
from fromage.octopus.pointing import regions
from fromage.octopus.recognition import MEANT, NOTHING, DecoderLayer, Detections, Recognizer


def some(B=3, N=4, counts=(2, 4, 1), meant=(1, 2, 0), L=2):
    torch.manual_seed(0)
    boxes = torch.zeros(B, max(counts), 4)
    for row, count in zip(boxes, counts, strict=True):
        row[:count] = torch.rand(count, 4) * 0.5 + 0.2
    found = Detections(torch.randn(L, B, N, 3), torch.rand(L, B, N, 4) * 0.5 + 0.2, torch.zeros(B, N, 8))
    return found, Objects(boxes, list(counts), list(meant))


def cost(logits, boxes, objects, row, query, place):
    kind = MEANT if place < objects.meant[row] else 1
    ours, theirs = boxes[row, query], objects.boxes[row, place]
    iou = generalized_box_iou(*(box_convert(b[None], "cxcywh", "xyxy") for b in (ours, theirs)))
    return float(CLASS * -logits[row, query].softmax(0)[kind] + L1 * (ours - theirs).abs().sum() - GIOU * iou)


def test_the_matching_is_the_cheapest_of_all():
    found, objects = some()
    logits, boxes = found.logits[-1], found.boxes[-1]
    matched = match(logits, boxes, objects)
    for row, count in enumerate(objects.counts):

        def total(queries, row=row):
            return sum(cost(logits, boxes, objects, row, query, place) for place, query in enumerate(queries))

        best = min(itertools.permutations(range(4), count), key=total)
        assert matched[row, :count].tolist() == list(best)


def test_what_is_not_a_number_is_matched_and_shows_in_the_loss():
    found, objects = some()
    boxes = found.boxes.clone()
    boxes[:, 1] = torch.nan
    loss, matched, _ = set_loss(replace(found, boxes=boxes), objects)
    assert loss.isnan() and len({*matched[1].tolist()}) == 4


def test_one_image_is_matched_as_in_a_batch():
    found, objects = some()
    whole = match(found.logits[0], found.boxes[0], objects)
    for row in range(3):
        one = Objects(objects.boxes[row : row + 1], objects.counts[row : row + 1], objects.meant[row : row + 1])
        alone = match(found.logits[0, row : row + 1], found.boxes[0, row : row + 1], one)
        assert torch.equal(alone[0], whole[row])


def test_what_is_right_costs_nothing_for_boxes_and_little_for_the_class():
    _, objects = some(counts=(2, 4, 1))
    boxes, logits = torch.rand(1, 3, 4, 4), torch.full((1, 3, 4, 3), -20.0)
    logits[..., NOTHING] = 20
    order = [3, 1, 0, 2]
    for row, count in enumerate(objects.counts):
        for place in range(count):
            boxes[0, row, order[place]] = objects.boxes[row, place]
            logits[0, row, order[place]] = torch.tensor([20.0, -20, -20] if place < objects.meant[row] else [-20.0, 20, -20])
    loss, matched, parts = set_loss(Detections(logits, boxes, torch.zeros(3, 4, 8)), objects)
    assert float(loss) < 1e-4 and all(float(value) < 1e-4 for value in parts.values())
    assert matched[1].tolist() == order


def test_images_of_which_nothing_is_known_do_not_count():
    found, objects = some()
    empty = Objects(torch.zeros(3, 0, 4), [0, 0, 0], [0, 0, 0])
    boxes = found.boxes.clone().requires_grad_()
    loss, matched, _ = set_loss(replace(found, boxes=boxes), empty)
    loss.backward()
    assert float(loss) == 0 and matched.shape == (3, 0) and boxes.grad.abs().sum() == 0
    more = Objects(torch.cat([objects.boxes, torch.zeros(1, 4, 4)]), [*objects.counts, 0], [*objects.meant, 0])
    wider = Detections(*(torch.cat([x, x[:, :1]], 1) for x in (found.logits, found.boxes)), found.relay)
    torch.testing.assert_close(set_loss(wider, more)[0], set_loss(found, objects)[0])


def test_every_layer_is_judged():
    found, objects = some()
    logits, boxes = found.logits.requires_grad_(), found.boxes.requires_grad_()
    set_loss(replace(found, logits=logits, boxes=boxes), objects)[0].backward()
    assert (logits.grad.flatten(1).norm(dim=1) > 0).all() and (boxes.grad.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("grid", [(2, 2), (3, 5)])
def test_boxes_lie_in_the_image_and_start_from_the_queries_points(grid):
    torch.manual_seed(0)
    recognizer = Recognizer(8, 6, grid, 5, decoder_width=16, layers=2, heads=2)
    found = recognizer(torch.randn(2, 5, 8), torch.randn(2, grid[0] * grid[1], 6))
    assert found.boxes.shape == (2, 2, 5, 4) and found.logits.shape == (2, 2, 5, 3) and found.relay.shape == (2, 5, 8)
    assert ((found.boxes > 0) & (found.boxes < 1)).all() and ((found.corners >= 0) & (found.corners <= 1)).all()
    torch.nn.init.zeros_(recognizer.box[-2].weight)
    torch.nn.init.zeros_(recognizer.box[-2].bias)
    at = recognizer(torch.randn(2, 5, 8), torch.randn(2, grid[0] * grid[1], 6)).boxes[-1][..., :2]
    torch.testing.assert_close(at, recognizer.points.sigmoid().expand(2, -1, -1))


def test_the_places_of_patches_tell_them_apart():
    places = Recognizer(8, 6, (3, 5), 2, decoder_width=32, layers=1, heads=2).places
    assert torch.cdist(places, places).add(torch.eye(15) * 9).min() > 0.3


def test_a_decoder_layer_is_pytorchs():
    sizes = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    ours, theirs = DecoderLayer(24, 4), torch.nn.TransformerDecoderLayer(24, 4, 96, **sizes)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    queries, patches = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 7, 24)
    made = [layer(queries, patches) for layer in (ours, theirs)]
    torch.testing.assert_close(*made)
    torch.testing.assert_close(*(torch.autograd.grad(each.square().sum(), queries)[0] for each in made))


def test_the_region_of_a_box_is_the_mean_of_the_patches_in_it():
    rows, columns = 8, 10
    maps = torch.randn(2, rows, columns, 3)  # (B, rows, columns, m)
    corners = torch.tensor([[[1, 2, 7, 8], [0, 0, 10, 8]], [[3, 0, 4, 5], [-4, 5, 2, 11]]])  # the last one sticks out
    boxes = box_convert(corners / torch.tensor([columns, rows, columns, rows]), "xyxy", "cxcywh")
    found = regions(maps.flatten(1, 2), (rows, columns), boxes)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        left, top, right, bottom = corners[row, column].clamp(min=0).tolist()
        torch.testing.assert_close(found[row, column], maps[row, top:bottom, left:right].mean((0, 1)), rtol=1e-3, atol=1e-5)
    empty = torch.tensor([[[0.5, 0.5, 0.0, 0.2], [1.5, 0.5, 0.2, 0.2]]])  # without area; beside the image
    assert not regions(maps[:1].flatten(1, 2), (rows, columns), empty).any()
    inside = torch.tensor([[[0.05, 0.0625, 1e-4, 1e-4]]])  # within the first patch
    torch.testing.assert_close(
        regions(maps[:1].flatten(1, 2), (rows, columns), inside)[0, 0], maps[0, 0, 0], rtol=1e-3, atol=1e-4
    )
