import math

import pytest
import torch

from fromage.training.losses import info_nce, next_token_loss, row_hashes


def test_next_token_loss_is_the_mean_over_targets_by_hand():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 11), torch.randint(0, 11, (3, 5))
    labels[0, 3:] = -100
    labels[2, 0] = 7  # a first token is nobody's target
    total, right, n = 0.0, 0, 0
    for b in range(3):
        for t in range(1, 5):
            if labels[b, t] >= 0:
                row = logits[b, t - 1].double()
                total -= (row[labels[b, t]] - row.exp().sum().log()).item()
                right += int(row.argmax() == labels[b, t])
                n += 1
    loss, share = next_token_loss(logits, labels)
    assert math.isclose(loss.item(), total / n, rel_tol=1e-5) and math.isclose(share.item(), right / n, rel_tol=1e-6)


def test_info_nce_is_the_mean_of_both_directions_by_hand():
    torch.manual_seed(1)
    images, texts = (torch.nn.functional.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    scale = torch.tensor(math.log(1 / 0.07))
    total = 0.0
    for i in range(6):
        for ours, others in ((images, texts), (texts, images)):
            scores = [math.exp(scale) * float(ours[i] @ others[j]) for j in range(6)]
            total += math.log(sum(map(math.exp, scores))) - scores[i]
    loss, _ = info_nce(images, texts, scale)
    assert math.isclose(loss.item(), total / 12, rel_tol=1e-5)


def test_other_captions_of_an_image_are_no_negatives_where_that_is_asked():
    torch.manual_seed(0)
    features = torch.randn(3, 7)[[0, 1, 0, 2, 0]]  # rows 0, 2 and 4 are of one image
    images = torch.nn.functional.normalize(features[:, :4], dim=-1).requires_grad_()
    texts = torch.nn.functional.normalize(torch.randn(5, 4), dim=-1).requires_grad_()
    scale = torch.tensor(1.5)
    loss, _ = info_nce(images, texts, scale, features)
    others = {0: [1, 3], 1: [0, 2, 3, 4], 2: [1, 3], 3: [0, 1, 2, 4], 4: [1, 3]}
    logits, wanted = scale.exp() * images @ texts.T, 0
    for table in (logits, logits.T):
        for row, negatives in others.items():
            wanted += (torch.logsumexp(table[row, [row, *negatives]], 0) - table[row, row]) / 10
    torch.testing.assert_close(loss, wanted)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (images, texts)))
    plain, distinct = info_nce(images, texts, scale)[0], torch.randn(5, 7)
    assert plain > loss and info_nce(images, texts, scale, distinct)[0] == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_rows_alone_have_equal_hashes(dtype):
    rows = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[:, 3] = 0
    twins = rows.clone()
    twins[:, 3] = -0.0
    assert torch.equal(row_hashes(rows), row_hashes(twins)) and len(row_hashes(rows).unique()) == 300
    swapped = rows[:, [1, 0, *range(2, 40)]]
    assert not (row_hashes(swapped) == row_hashes(rows)).any()


def test_info_nce_of_equal_sides_finds_all():
    rows = torch.eye(4)
    assert info_nce(rows, rows, torch.tensor(3.0))[1] == 1
