"""Losses that are NaN or infinite: the run stops and names the samples, or leaves the update out."""

import logging
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from test_module import TOY

from fromage.data.datamodule import CC3M
from fromage.errors import UserError
from fromage.models.fromage import load_model
from fromage.training.guarded_module import GuardedModule
from fromage.training.module import FromageModule
from fromage.training.nonfinite import NonFiniteGuard

BAD = 3  # the step whose loss is bad


class Spoiled(FromageModule):
    """A loss or a gradient goes wrong in one step."""

    how = "loss"

    def losses(self, *args, **named):
        out = super().losses(*args, **named)
        if self.trainer.training and self.global_step == BAD and self.how != "gradient":
            out.text_loss = out.text_loss * float(self.how)
        return out

    def on_after_backward(self):
        if self.global_step == BAD and self.how == "gradient":
            self.model.image_head.weight.grad[0, 0] = torch.nan


def fit(world, out, how, **options):
    pl.seed_everything(0)
    module = Spoiled(**{**TOY, **options})
    module.how = how
    data = CC3M(str(world / "cc3m" / "train"), None, batch_size=16, max_tokens=40, workers=0)
    saver = pl.callbacks.ModelCheckpoint(out, save_last=True, every_n_train_steps=1, enable_version_counter=False)
    trainer = pl.Trainer(max_steps=6, accelerator="cpu", logger=False, callbacks=[saver], gradient_clip_val=1.0,
                         enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    try:
        trainer.fit(module, data)
    finally:
        module.saved = saver.last_model_path
    return module


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_the_run_stops_with_step_samples_and_last_good_checkpoint(world, tmp_path, how):
    with pytest.raises(UserError) as stop:
        fit(world, tmp_path, how)
    message = str(stop.value)
    assert f"step {BAD}" in message and str(tmp_path / "last.ckpt") in message and "nonfinite skip" in message
    named = message.partition("samples ")[2].partition(", and 8 more")[0].split(", ")
    assert len(named) == 8 and all(key.isalnum() or "/" in key for key in named)
    assert all(p.isfinite().all() for p in load_model(tmp_path / "last.ckpt").trained().values())


def test_skipping_leaves_one_update_out_and_goes_on(world, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="fromage.training.nonfinite"):
        module = fit(world, tmp_path, "nan", nonfinite="skip")
    assert module.guard.skipped == 1 and f"step {BAD}" in caplog.text and module.global_step == 6
    moments = module.trainer.optimizers[0].state[module.model.visual_prefix.weight]
    assert moments["step"] == 5, "five updates in six steps"
    assert all(p.isfinite().all() for p in module.model.trained().values())


def test_a_bad_micro_batch_spoils_the_whole_update_and_only_that():
    guard, p = NonFiniteGuard(True, ("captioning", "text", "contrastive")), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([p], fused=True)
    for bad in (False, True, False):
        for micro in range(2):
            loss = torch.tensor(torch.inf if bad and micro == 0 else 1.0)
            guard.see([loss, loss, loss], [f"{bad}{micro}"])
        p.grad, before = torch.ones(2), p.detach().clone()
        guard.before_update(optimizer, 0)
        optimizer.step()
        assert torch.equal(p, before) == bad
    guard.check("nowhere")
    assert guard.skipped == 1


class Recorder(GuardedModule):
    """Records what is logged, as if on some device."""

    def __init__(self, device, due):
        super().__init__()
        self.there, self.said = torch.device(device), {}
        self._trainer = SimpleNamespace(_logger_connector=SimpleNamespace(should_update_logs=due))

    device = property(lambda self: self.there)
    trainer = property(lambda self: self._trainer)

    def log(self, name, value, prog_bar=False, **options):
        self.said[name] = value, prog_bar


@pytest.mark.parametrize(("device", "due", "logged"), [("cpu", False, True), ("cuda", False, False), ("cuda", True, True)])
def test_figures_are_read_from_a_device_only_where_they_are_logged(device, due, logged):
    module = Recorder(device, due)
    module.log_figures({"a": torch.ones((), requires_grad=True), "b": 0.5}, shown=["b"])
    assert module.said == ({"a": (torch.tensor(1.0), False), "b": (torch.tensor(0.5), True)} if logged else {})
    assert not any(value.requires_grad for value, _ in module.said.values())
