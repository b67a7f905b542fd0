"""Losses that are NaN or infinite: the run stops and names the samples, or leaves the update out."""

import logging

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
    guard, p = NonFiniteGuard(True), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([p], fused=True)
    for bad in (False, True, False):
        for micro in range(2):
            loss = torch.tensor(torch.inf if bad and micro == 0 else 1.0)
            guard.see({"text": loss, "answer": loss}, [f"{bad}{micro}"])
        p.grad, before = torch.ones(2), p.detach().clone()
        guard.before_update(optimizer, 0)
        optimizer.step()
        assert torch.equal(p, before) == bad
    guard.check("nowhere")
    assert guard.skipped == 1


def test_each_loss_stands_by_its_name_in_the_message():
    guard, p = NonFiniteGuard(False), torch.nn.Parameter(torch.ones(2))
    optimizer, p.grad = torch.optim.Adam([p], fused=True), torch.ones(2)
    guard.see({"answer": torch.tensor(1.5)}, ["a"])
    guard.see({"detection": torch.tensor(torch.nan), "answer": torch.tensor(2.5)}, ["b"])
    guard.before_update(optimizer, 7)
    said = r"step 7: .*samples a, b; answer loss 1\.5, detection loss nan, answer loss 2\.5, gradient norm 1\.414"
    with pytest.raises(UserError, match=said):
        guard.check("nowhere")


class Recorder(GuardedModule):
    """Records what is logged, as if on some device."""

    def __init__(self, device):
        super().__init__()
        self.there, self.said = torch.device(device), {}

    device = property(lambda self: self.there)

    def log(self, name, value, prog_bar=False, **options):
        self.said[name] = value, prog_bar


@pytest.mark.parametrize("due", [False, True])
def test_figures_are_read_from_a_device_only_where_they_are_logged(due):
    module = Recorder("cuda")
    module.figures_due = due
    module.log_figures({"a": torch.ones((), requires_grad=True), "b": 0.5}, shown=["b"])
    assert module.said == ({"a": (torch.tensor(1.0), False), "b": (torch.tensor(0.5), True)} if due else {})
    assert not any(value.requires_grad for value, _ in module.said.values())


class Accumulating(Recorder):
    """Fits five batches an epoch, and records of each whether its figures are logged, in the step and after it."""

    def __init__(self, device):
        super().__init__(device)
        self.guard, self.p = NonFiniteGuard(False), torch.nn.Parameter(torch.ones(1))
        self.due, self.after, self.of_lightning = [], [], []

    def training_step(self, batch, index):
        self.due.append(self.figures_due)
        self.of_lightning.append(self.trainer._logger_connector.should_update_logs)
        return (self.p * batch.sum()).sum()

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.after.append(self.figures_due)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.0, fused=True)


@pytest.mark.parametrize(
    ("device", "accumulated", "every", "steps"),  # batches of a step, steps between logs, steps that are logged
    [
        ("cuda", 1, 3, [3, 6, 9]), ("cuda", 2, 1, [1, 2, 3, 4, 5, 6]), ("cuda", 2, 2, [2, 4, 6]), ("cuda", 3, 4, [4]),
        ("cuda", 1, 0, []), ("cpu", 2, 2, [1, 2, 3, 4, 5, 6]),
    ],
)  # fmt: skip
def test_all_batches_of_a_step_are_logged_or_none(device, accumulated, every, steps, tmp_path):
    module = Accumulating(device)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, accumulate_grad_batches=accumulated, log_every_n_steps=every, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(5, 1)))
    an_epoch = -(-5 // accumulated)  # steps; the last batches of an epoch are a step even if they are few
    step_of = [1 + epoch * an_epoch + batch // accumulated for epoch in range(2) for batch in range(5)]
    assert module.due == module.after == [step in steps for step in step_of]
    if device == "cuda":
        assert module.due == module.of_lightning
