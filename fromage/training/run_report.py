"""The report of a run, also of an interrupted one: metrics, curves, samples, configuration, versions."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml

from fromage.checkpoints.card import about_data
from fromage.distribution import versions
from fromage.errors import UserError, first_line
from fromage.images.codec import to_png
from fromage.images.line_chart import line_chart
from fromage.io import write_files
from fromage.printable import printable
from fromage.training.checkpoint_io import saved_checkpoint
from fromage.training.guarded_module import logs_step

PACKAGES = ("fromage", "torch", "pytorch-lightning", "transformers", "open_clip_torch", "webdataset")
CHARTS = {  # title: pattern of the metrics; the group is the name of a line
    "training losses": r"train/(\w*loss)",
    "training accuracies": r"train/(\w+)_accuracy",
    "validation losses": r"val/(\w*loss)",
    "validation recalls in percent": r"val/(\w+_r\d+)",
    "learning rate": r"train/(lr)",
    "examples per second": r"train/(examples_per_second)",
}


class RunReport(pl.Callback):
    """Writes report.md and its images into the logger's folder, after every validation and at the end of the run.

    Its data is saved in the checkpoints, so the report of a resumed run covers all steps.
    """

    def __init__(self) -> None:
        self.curves: dict[str, list[tuple[int, float]]] = {}  # (optimiser steps made, figure)
        self.examples, self.before = 0, 0.0  # before: seconds before the run was resumed
        self.data: dict[str, Any] = {}  # the configuration's, for the model card
        self.folder: Path | None = None
        self.began, self.commit = time.monotonic(), ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; get the folder, a call that all devices must make."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)
        self.began, self.commit = time.monotonic() - self.before, git_commit()
        self.data = about_data(self._settings(pl_module)) or self.data

    def state_dict(self) -> dict[str, Any]:
        """The data for the checkpoint."""
        seconds = time.monotonic() - self.began
        return {"curves": self.curves, "examples": self.examples, "seconds": seconds, "data": self.data}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the data of the checkpoint."""
        self.curves, self.examples, self.before = (state_dict[name] for name in ("curves", "examples", "seconds"))
        self.data = state_dict.get("data", {})  # older checkpoints have none

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count examples; record the metrics of logged steps."""
        self.examples += len(batch.keys) * trainer.world_size
        if logs_step(trainer, trainer.global_step):
            self._note(trainer, "train/")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report of a running run."""
        if not trainer.sanity_checking:
            self._note(trainer, "val/")
            self._write(trainer, pl_module, "running")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report of a finished run."""
        self._write(trainer, pl_module, "finished")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write the report of a run ended by an error, Ctrl-C or SIGTERM."""
        self._write(trainer, pl_module, f"interrupted: {first_line(exception)}")

    def _note(self, trainer: pl.Trainer, stage: str) -> None:
        for name, value in trainer.callback_metrics.items():
            curve = self.curves.setdefault(name, []) if name.startswith(stage) else None
            if curve is not None and (not curve or curve[-1][0] < trainer.global_step):
                curve.append((trainer.global_step, float(value)))

    def _settings(self, module: Any) -> str:
        """The configuration that the command line wrote, else the hyperparameters."""
        config = Path(self.folder or "") / "config.yaml"
        return config.read_text(encoding="utf-8") if config.is_file() else yaml.safe_dump(dict(module.hparams))

    def _write(self, trainer: pl.Trainer, module: Any, outcome: str) -> None:
        if self.folder is None or trainer.state.fn != "fit" or not trainer.is_global_zero:  # before the first step
            return
        files = {f"{title}.svg": chart.encode() for title, chart in self.charts().items()}
        files |= {f"{tag}.png": to_png(sheet) for tag, sheet in getattr(module, "sheets", {}).items()}
        images = {"report-" + re.sub("[ /]", "-", name): content for name, content in files.items()}
        settings = self._settings(module)
        parts = ["# Run report", rows(self.facts(trainer, outcome)), "## Figures", rows(self.figures())]
        parts += [*(f"![{name}]({name})" for name in images), "## Configuration", f"```yaml\n{settings.strip()}\n```\n"]
        try:
            write_files(self.folder, images | {"report.md": printable("\n\n".join(parts), "\n").encode()})
        except UserError as error:  # the run continues without a report
            warnings.warn(f"no report of the run: {error}", stacklevel=2)

    def charts(self) -> dict[str, str]:
        """An SVG for each title of CHARTS that has data."""
        matches = {title: [re.fullmatch(pattern, name) for name in self.curves] for title, pattern in CHARTS.items()}
        lines = {title: {m[1]: self.curves[m[0]] for m in found if m} for title, found in matches.items()}
        return {title: line_chart(curves, title, x="step") for title, curves in lines.items() if curves}

    def figures(self) -> list[list[str]]:
        """A table of metrics: last values, and the best ones of validation."""
        table = [["figure", "last", "best", "at step"], ["---", "---:", "---:", "---:"]]
        for name, curve in sorted(self.curves.items()):
            step, best = (min if name.endswith("loss") else max)(curve, key=lambda point: point[1])
            judged = [f"{best:.4g}", str(step)] if name.startswith("val/") else ["", ""]
            table.append([name, f"{curve[-1][1]:.4g}", *judged])
        return table

    def facts(self, trainer: Any, outcome: str) -> list[list[str]]:
        """A table of facts: outcome, duration, devices, versions."""
        device, seconds = trainer.strategy.root_device, time.monotonic() - self.began
        name = f"{device.type}, {torch.get_num_threads()} threads"
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            name = f"{torch.cuda.get_device_name(device)}, at most {peak:.1f} GiB in use"
        steps = trainer.max_steps if trainer.max_steps >= 0 else trainer.estimated_stepping_batches
        installed = [
            f"Python {platform.python_version()}",
            *(f"{name} {is_at}" for name, is_at in versions(PACKAGES).items()),
        ]
        return [
            ["outcome", outcome],
            ["---", "---"],
            ["steps", f"{trainer.global_step} of {steps}"],
            ["hours", f"{seconds / 3600:.3f}, validations included"],
            ["examples", f"{self.examples}, {self.examples / seconds:.1f} per second"],
            ["devices", f"{trainer.world_size} x {name}"],
            ["last checkpoint", saved_checkpoint(trainer) or "none"],
            ["commit", self.commit or "not run from a clone"],
            ["versions", ", ".join(installed)],
        ]


def git_commit() -> str:
    """The commit of the clone with this package, with '-dirty' if files differ; '' outside of a clone."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not shutil.which("git"):
        return ""
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def rows(table: list[list[str]]) -> str:
    """A table in Markdown; its second row is the line under the header."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)
