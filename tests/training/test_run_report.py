"""The report of a run: whole, resumed, interrupted; and that it never ends a run itself."""

import re
import xml.etree.ElementTree as ET

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger

from fromage.data.datamodule import CC3M
from fromage.errors import UserError
from fromage.training import run_report as run_report
from fromage.training.checkpoint_io import SafeCheckpoint
from fromage.training.module import FromageModule
from fromage.training.run_report import RunReport, git_commit

TOY = {"lm": "toy", "vision": "toy", "vision_weights": None, "dtype": "float32", "warmup_steps": 2, "q": 16, "shown": 2}


class Stop(pl.Callback):
    """Ends a run in a certain way after a step."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise self.error


def run(world, out, steps, *callbacks):
    """Fit on the toy world, from the last checkpoint in `out` where there is one; returns the trainer."""
    pl.seed_everything(0)
    data = CC3M(str(world / "cc3m" / "train"), str(world / "cc3m" / "val"), batch_size=8, max_tokens=40, workers=0)
    saver = SafeCheckpoint(out, save_last=True, save_top_k=0, every_n_train_steps=1, enable_version_counter=False)
    logger = CSVLogger(out, "logs")
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", logger=logger, callbacks=[RunReport(), saver, *callbacks],
                         log_every_n_steps=1, val_check_interval=2, check_val_every_n_epoch=None, limit_val_batches=2,
                         num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(FromageModule(**TOY), data, ckpt_path="last")
    return trainer


def test_a_run_that_logs_no_step_has_a_report(world, tmp_path):
    data = CC3M(str(world / "cc3m" / "train"), batch_size=8, max_tokens=40, workers=0)
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=CSVLogger(tmp_path, "logs"), callbacks=[RunReport()],
                         log_every_n_steps=0, enable_progress_bar=False, enable_checkpointing=False)  # fmt: skip
    trainer.fit(FromageModule(**TOY), data)
    assert read(tmp_path, 0)[0]["outcome"] == ["finished"]


def read(out, version):
    """A report's facts and figures, and its folder."""
    folder = out / "logs" / f"version_{version}"
    text = (folder / "report.md").read_text()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in table}, text, folder


@pytest.fixture(scope="module")
def out(world, tmp_path_factory):
    """A run of five steps that an error ends after the fourth, which is not saved, and its resumption."""
    out = tmp_path_factory.mktemp("run")
    with pytest.raises(UserError):
        run(world, out, 5, Stop(4, UserError("the disk \x1b]0;owned\x07 is full\nof files")))
    return out, run(world, out, 5)


def test_an_interrupted_run_has_a_report_that_says_why(out):
    facts, _, _ = read(out[0], 0)
    assert facts["outcome"] == [
        "interrupted: the disk \N{REPLACEMENT CHARACTER}]0;owned\N{REPLACEMENT CHARACTER} is full"
    ] and facts["steps"] == ["4 of 5"]
    assert facts["val/t2i_r1"][2] == "2", "validated after step 2"


def test_a_resumed_run_reports_on_all_of_its_steps(out):
    facts, _, folder = read(out[0], 1)
    assert facts["outcome"] == ["finished"] and facts["steps"] == ["5 of 5"] and facts["examples"][0].startswith("40, ")
    groups = ET.parse(folder / "report-training-losses.svg").getroot().iter("{http://www.w3.org/2000/svg}g")
    lines = [group[0].get("d") for group in groups if group.get("id", "").startswith("line-")]
    assert [len(re.findall("[ML]", line)) for line in lines] == [5] * 4
    assert facts["last checkpoint"][0].endswith("last.ckpt")


def test_figures_are_those_of_the_run_and_the_best_is_the_least_loss(out):
    facts, _, _ = read(out[0], 1)
    metrics = out[1].callback_metrics
    for name in ("val/loss", "val/t2i_r5", "train/loss"):
        assert facts[name][0] == f"{float(metrics[name]):.4g}"
    curves = next(c for c in out[1].callbacks if isinstance(c, RunReport)).curves
    assert [step for step, _ in curves["val/loss"]] == [2, 4]
    assert facts["val/loss"][1] == f"{min(value for _, value in curves['val/loss']):.4g}"
    assert facts["val/t2i_r5"][1] == f"{max(value for _, value in curves['val/t2i_r5']):.4g}"


def test_every_image_is_there_and_nothing_is_left_over(out):
    _, text, folder = read(out[0], 1)
    named = re.findall(r"!\[[^]]*\]\(([\w.-]+)\)", text)
    assert {"report-val-captions.png", "report-val-search.png", "report-validation-recalls-in-percent.svg"} <= set(named)
    assert {p.name for p in folder.iterdir() if p.name.startswith((".", "report"))} == {*named, "report.md"}
    assert Image.open(folder / "report-val-search.png").width > 400


def test_it_holds_configuration_versions_and_commit(out):
    facts, text, _ = read(out[0], 1)
    assert f"torch {torch.__version__}".partition("+")[0] in facts["versions"][0]
    assert "warmup_steps: 2" in text and facts["devices"][0].startswith("1 x cpu")
    assert facts["commit"] == [git_commit() or "not run from a clone"]


def test_the_commit_is_the_clones_own_only(tmp_path, monkeypatch):
    monkeypatch.setattr(run_report, "__file__", str(tmp_path / "site-packages" / "fromage" / "training" / "run_report.py"))
    assert git_commit() == ""


def test_a_report_that_cannot_be_written_is_a_warning(world, tmp_path, monkeypatch):
    def full(folder, files):
        raise UserError(f"{folder}: cannot be written (No space left on device)")

    monkeypatch.setattr(run_report, "write_files", full)
    with pytest.warns(UserWarning, match="no report of the run"):
        assert run(world, tmp_path, 1).global_step == 1


def test_what_ends_before_the_first_step_or_only_validates_has_no_report(out, world, tmp_path):
    report = RunReport()
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[report],
                         enable_progress_bar=False, enable_checkpointing=False, limit_val_batches=1)  # fmt: skip
    with pytest.raises(UserError, match="nowhere"):
        trainer.fit(FromageModule(**TOY), CC3M(str(tmp_path / "nowhere")))
    trainer.validate(FromageModule(**TOY), CC3M("-", str(world / "cc3m" / "val"), batch_size=8), verbose=False)
    assert not list(tmp_path.glob("report*"))
