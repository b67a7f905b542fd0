"""The learning rate: its factor by step, and a run that goes on."""

import pytest
import torch

from fromage.training.schedule import Schedule, factor


def test_warm_up_then_a_cosine_that_stays_at_zero():
    assert [factor(n, 4) for n in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [factor(n, 2, 0, 2) for n in range(6)] == pytest.approx([0, 0.5, 1, 0.5, 0, 0])
    assert [factor(n, decay=4) for n in (0, 2, 4, 9)] == pytest.approx([1, 0.5, 0, 0])


def begun(rate, decay, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = Schedule(optimizer, 1, decay=decay)
    for _ in range(steps):
        optimizer.step()
        schedule.step()
    return schedule


def test_a_longer_run_goes_on_at_its_own_rate_and_does_not_rise_from_zero():
    ended = begun(1.0, 4, 5)
    assert ended.get_last_lr() == [0]
    again, whole = begun(0.5, 9, 0), begun(0.5, 9, 5)
    again.load_state_dict(ended.state_dict())
    assert again.get_last_lr() == whole.get_last_lr() == [again.optimizer.param_groups[0]["lr"]] != [0]
    for schedule in (again, whole):
        schedule.optimizer.step()
        schedule.step()
    assert again.get_last_lr() == whole.get_last_lr()


def test_the_state_of_a_former_version_is_read():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=1)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    former = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, fall], [1])
    for _ in range(3):
        optimizer.step()
        former.step()
    schedule = begun(1.0, 4, 0)
    schedule.load_state_dict(former.state_dict())
    assert schedule.last_epoch == 3 and schedule.get_last_lr() == pytest.approx(former.get_last_lr())
