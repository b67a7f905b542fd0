"""The learning-rate finder: where losses fall fastest, which rates are tried, when it gives up."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fromage.errors import UserError
from fromage.training.lr_finder import LRFinder, steepest


@given(st.integers(10, 90), st.floats(0.5, 3), st.integers(2, 5))
def test_the_steepest_place_of_a_falling_curve_is_its_middle(middle, slope, width):
    losses = [5 + math.tanh(slope * (middle - 0.5 - step)) for step in range(101)]
    assert abs(steepest(losses, width) - middle) <= 1


@pytest.mark.parametrize("losses", [[], [1.0], [1.0, 2.0, 3.0, 4.0, 5.0], [2.0] * 9])
def test_what_never_falls_has_none(losses):
    assert steepest(losses, 2) is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 1), (1e-3, 1e-4), (float("nan"), 1)])
def test_a_range_that_cannot_be_tried_is_refused(low, high):
    with pytest.raises(UserError, match="min_lr"):
        LRFinder(low, high)


def go(losses, steps, tmp_path):
    """Feed losses to a finder as a trainer does, until it stops; returns it and the trainer."""
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value, lr_scheduler_configs=["the run's own"]),
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.0}])], log_dir=str(tmp_path), is_global_zero=True,
        max_steps=steps, should_stop=False,
    )  # fmt: skip
    finder = LRFinder(1e-4, 1.0)
    finder.on_fit_start(trainer, None)
    for trainer.global_step, loss in enumerate(losses):
        finder.on_train_batch_start(trainer, None, None, 0)
        finder.on_train_batch_end(trainer, None, {"loss": torch.tensor(loss)}, None, 0)
        if trainer.should_stop:
            break
    return finder, trainer


def test_rates_grow_by_one_factor_from_the_least_to_the_greatest(tmp_path, capsys):
    finder, trainer = go([3.0, 3.0, 1.0, 1.0, 1.0], 5, tmp_path)
    assert finder.rates == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1.0) and not trainer.strategy.lr_scheduler_configs
    finder.on_train_end(trainer, None)
    assert "--model.lr 0.01, " in capsys.readouterr().out and (tmp_path / "lr_find.svg").is_file()


@pytest.mark.parametrize("worse", [4.5, math.inf, math.nan])
def test_it_stops_where_all_is_lost(worse, tmp_path):
    finder, _ = go([3.0, 3.0, 3.0, 1.0, 1.0, worse, 1.0], 7, tmp_path)
    assert len(finder.losses) == 6 and steepest(finder.losses[:5], 2) == 3


def test_a_loss_that_never_falls_is_an_error(tmp_path):
    finder, trainer = go([1.0, 1.0, 1.0, 2.0, 2.0], 5, tmp_path)
    with pytest.raises(UserError, match="never fell"):
        finder.on_train_end(trainer, None)


def test_without_a_number_of_steps_there_is_no_range():
    with pytest.raises(UserError, match=r"needs trainer\.max_steps"):
        LRFinder().on_fit_start(SimpleNamespace(max_steps=-1), None)
