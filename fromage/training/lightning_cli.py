"""LightningCLI as `fromage fit` and its kin use it: checkpoints and run folders are looked at before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import inf
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from fromage.checkpoints.lightning import read_checkpoint
from fromage.checkpoints.run_folder import checkpoint_file
from fromage.checks import check_real, check_whole
from fromage.errors import UserError
from fromage.training import runs
from fromage.training.checkpoint_io import saved_checkpoint
from fromage.training.option_errors import class_of
from fromage.training.progress_bar import RunProgressBar
from fromage.training.run_report import RunReport

UNTRAINED = "no --ckpt_path is given: trained parameters are as they begin, and so are the figures"


class CommandLine(LightningCLI):
    """Looks at the checkpoint before anything is loaded, and lets options count, not the checkpoint's own ones."""

    def __init__(self, trainers: list[pl.Trainer], *args: Any, **kwargs: Any) -> None:
        """trainers: receives the trainer, which is asked where a run that failed stopped. The rest is LightningCLI's."""
        self.trainers = trainers
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As of LightningCLI."""
        parser.add_argument("--overwrite", action="store_true", help="replace another run's checkpoints, or predictions")

    def _parse_ckpt_path(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint to go on from, and the folder of the run. Raises UserError where either cannot be used."""
        config = self.config[self.subcommand]
        check_trainer(config.trainer)
        if config.ckpt_path == "last":
            config.ckpt_path = str(runs.newest(config) or "last")  # a damaged one is noticed when it is loaded
        elif config.ckpt_path and config.ckpt_path not in ("best", "hpc", "registry"):
            config.ckpt_path = str(checkpoint_file(config.ckpt_path))
            read_checkpoint(config.ckpt_path)
        elif not config.ckpt_path and self.subcommand != "fit" and not (config.model.get("init_args") or {}).get("init"):
            warnings.warn(UNTRAINED, stacklevel=2)
        if self.subcommand == "fit" and not config.trainer.fast_dev_run:
            runs.prepare(config)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """As of LightningCLI; trainer.strategy may name a class. Raises MisconfigurationException for a bad option."""
        options = self.config_init[self.subcommand].trainer
        try:
            named = options.strategy
            if isinstance(named, str) and "." in named:  # which Lightning would take for a name of its own
                kwargs["strategy"] = class_of(named)()
            given = options.callbacks if isinstance(options.callbacks, list) else [options.callbacks]
            callbacks: list[Any] = [each for each in given if each is not None]
            kwargs["callbacks"] = callbacks + progress_bars(options, callbacks)
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:  # of an option of the trainer
            raise MisconfigurationException(str(error)) from error

    def after_instantiate_classes(self) -> None:
        """Hand the trainer out, and --overwrite on to the callbacks that know it."""
        self.trainers.append(self.trainer)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if self.config[self.subcommand].overwrite and hasattr(callback, "overwrite"):
                callback.overwrite = True

    def after_fit(self) -> None:
        """Print what the run has left."""
        if self.trainer.is_global_zero:
            print("\n".join(_left(self.trainer)))


def progress_bars(options: Any, callbacks: Sequence[Any]) -> list[ProgressBar]:
    """Ours, unless the trainer's options want none, or its callbacks have another one."""
    if options.enable_progress_bar is False or any(isinstance(each, ProgressBar) for each in callbacks):
        return []
    return [RunProgressBar(options.log_every_n_steps or 1)]


def check_trainer(options: Any) -> None:
    """Raise UserError for options of the trainer that it takes without a look, and fails of later."""
    if not hasattr(options, "accumulate_grad_batches"):
        raise UserError(f"trainer is {options!r:.60}; it must be a mapping of the trainer's options")
    check_whole("trainer.accumulate_grad_batches", options.accumulate_grad_batches, 1)
    for name, least in {"check_val_every_n_epoch": 1, "log_every_n_steps": 0, "num_sanity_val_steps": -1}.items():
        if (value := options[name]) is not None:
            check_whole(f"trainer.{name}", value, least)
    if options.gradient_clip_val is not None:
        check_real("trainer.gradient_clip_val", options.gradient_clip_val, 0, inf)


def _left(trainer: pl.Trainer) -> list[str]:
    """What a fit that came to its end has left, in lines."""
    saved = saved_checkpoint(trainer)
    lines = [f"checkpoint: {saved} (step {trainer.global_step})"] if saved else []
    folders = [callback.folder for callback in trainer.callbacks if isinstance(callback, RunReport)]  # type: ignore[attr-defined]
    return lines + [f"report: {folder / 'report.md'}" for folder in folders if folder and (folder / "report.md").exists()]
