import math

import torch

from fromage.training.losses import info_nce, next_token_loss


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


def test_info_nce_of_equal_sides_finds_all():
    rows = torch.eye(4)
    assert info_nce(rows, rows, torch.tensor(3.0))[1] == 1
