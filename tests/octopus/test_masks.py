"""The mask head: shapes, its loss beside a plain one, and that it changes nothing of the others."""

import pytest
import torch
from tiny_octopus import build

from fromage.errors import UserError
from fromage.octopus.masks import MaskHead, at_size, mask_losses
from fromage.octopus.recognition import Recognizer

SIZES, SCALE = (8, 6, (3, 5), 4), 4


def recognised(mask_scale):
    torch.manual_seed(0)
    recognizer = Recognizer(*SIZES, decoder_width=16, layers=2, heads=2, mask_scale=mask_scale)
    rows = torch.tensor([0, 0, 1])
    return recognizer, recognizer(torch.randn(3, 4, 8), torch.randn(2, 15, 6), rows)


def test_each_query_of_each_prompt_has_a_mask_and_the_rest_is_as_without():
    without, nothing = recognised(0)
    recognizer, found = recognised(SCALE)
    assert nothing.masks is None and found.masks.shape == (3, 4, 3 * SCALE, 5 * SCALE) == (3, 4, *recognizer.masks.size)
    own = recognizer.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in without.state_dict().items())
    assert {name.split(".")[0] for name in own.keys() - without.state_dict().keys()} == {"masks"}


def test_a_mask_is_of_its_query_and_its_own_image():
    torch.manual_seed(0)
    head, states, patches = MaskHead(16, 6, (3, 5), SCALE), torch.randn(3, 4, 16), torch.randn(2, 15, 6)
    masks = head(states, patches, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(head(states[2:, 1:2], patches[1:], torch.tensor([0])), masks[2:, 1:2])
    assert not torch.allclose(head(states[:1], patches[1:], torch.tensor([0])), masks[:1])


def test_cells_lie_where_their_patches_do():
    """But for the norm over the image, a patch moves the cells at its place most, and those of far patches not at all."""
    torch.manual_seed(0)
    head, rows = MaskHead(16, 6, (3, 5), SCALE), torch.tensor([0])
    head.upsample[1] = torch.nn.Identity()
    patches = torch.zeros(1, 15, 6)
    patches[0, 7] = 3.0  # the second row's third
    moved = (head(torch.ones(1, 1, 16), patches, rows) - head(torch.ones(1, 1, 16), 0 * patches, rows))[0, 0]
    sums = moved.abs().view(3, SCALE, 5, SCALE).sum((1, 3))  # (3, 5), of each patch's cells
    assert int(sums.argmax()) == 7 and sums[:, [0, 4]].max() < 1e-5 < sums.max()


def test_the_losses_are_those_of_each_object_in_turn():
    torch.manual_seed(0)
    logits, wanted = torch.randn(3, 4, 5), torch.rand(3, 4, 5)
    got = mask_losses(logits, wanted)
    likely = logits.sigmoid()
    crossed = -(wanted * likely.log() + (1 - wanted) * (1 - likely).log())
    assert float(got["mask"]) == pytest.approx(float(crossed.mean()), rel=1e-5)
    dice = [1 - float((2 * (p * w).sum() + 1) / (p.sum() + w.sum() + 1)) for p, w in zip(likely, wanted, strict=True)]
    assert float(got["dice"]) == pytest.approx(sum(dice) / 3, rel=1e-5)
    sure = mask_losses((wanted > 0.5).float() * 40 - 20, (wanted > 0.5).float())
    assert float(sure["mask"]) < 1e-6 and float(sure["dice"]) < 1e-6


def test_no_object_costs_nothing_and_has_a_gradient():
    logits = torch.randn(0, 4, 5, requires_grad=True)
    losses = mask_losses(logits, torch.zeros(0, 4, 5))
    sum(losses.values()).backward()
    assert [float(value.detach()) for value in losses.values()] == [0, 0] and logits.grad is not None


def test_a_mask_at_the_size_of_an_image():
    logits = torch.full((4, 4), -1.0)
    logits[:2, 2:] = 1.0
    mask = at_size(logits, 40, 24)
    assert mask.shape == (24, 40) and mask[:9, 20:].all() and mask[:12, 25:].all()
    assert not mask[12:].any() and not mask[:, :20].any()


def test_a_head_learns_the_shape_of_a_thing():
    """Two kinds of patches, one of them meant: after some steps the mask is theirs."""
    torch.manual_seed(0)
    head, wanted = MaskHead(16, 6, (3, 3), SCALE), torch.zeros(1, 12, 12)
    wanted[0, 4:8, :8] = 1  # the second row's first two patches
    patches = torch.zeros(1, 9, 6)
    patches[0, 3:5] = 1.0
    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    for _ in range(60):
        losses = mask_losses(head(torch.ones(1, 1, 16), patches, torch.tensor([0]))[:, 0], wanted)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert ((head(torch.ones(1, 1, 16), patches, torch.tensor([0]))[0, 0] > 0) == (wanted[0] > 0)).all()


def test_masks_need_queries():
    with pytest.raises(UserError, match="masks are of object queries"):
        build(num_queries=0, mask_scale=4)
    assert build(mask_scale=4).mask_size == (8, 8) and build().mask_size is None
