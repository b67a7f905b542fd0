"""fit, validate, test, predict: Lightning's own commands over any module and data module."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fromage.checks import check_real, check_whole
from fromage.errors import UserError
from fromage.training.configs import described, with_configs_found
from fromage.training.option_errors import class_of
from fromage.training.option_errors import told as told_of_option

if TYPE_CHECKING:
    import pytorch_lightning as pl

FITTING = ("fit", "validate", "test", "predict")
HELP = """{command}: by a configuration, over which later words count

    lightning {command} --config cc3m.yaml --model.lr 1e-4 --trainer.max_steps 1000

{configurations}

--model.help fromage.FromageModule tells the options of a class; --data.help and --trainer.callbacks.help do so too. All
options of Lightning follow, in some seconds.
"""


def fitting(argv: list[str]) -> None:
    """fit, validate, test, predict: LightningCLI over any module and data module, configured by files and options.

    Raises:
        UserError: something is wrong with the options, the data or the disk.
        KeyboardInterrupt: after Ctrl-C; the message says what was saved and how to go on.
    """
    words = with_configs_found(argv)  # before anything is imported that takes time
    if {"-h", "--help"} & set(words):
        print(opening(argv[0]), flush=True)
    import pytorch_lightning as pl
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
    from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

    from fromage.checkpoints.lightning import read_checkpoint
    from fromage.checkpoints.run_folder import checkpoint_file
    from fromage.io import disk_error
    from fromage.training import runs
    from fromage.training.checkpoint_io import INTERRUPTED
    from fromage.training.predictions import PredictionWriter

    trainers: list[pl.Trainer] = []

    class CLI(LightningCLI):
        """Looks at the checkpoint before anything is loaded, and lets options count, not the checkpoint's own ones."""

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument("--overwrite", action="store_true", help="replace another run's checkpoints, or predictions")

        def _parse_ckpt_path(self) -> None:
            pass

        def before_instantiate_classes(self) -> None:
            config = self.config[self.subcommand]
            check_trainer(config.trainer)
            if config.ckpt_path == "last":
                config.ckpt_path = str(runs.newest(config) or "last")  # a damaged one is noticed when it is loaded
            elif config.ckpt_path and config.ckpt_path not in ("best", "hpc", "registry"):
                config.ckpt_path = str(checkpoint_file(config.ckpt_path))
                read_checkpoint(config.ckpt_path)
            if self.subcommand == "fit" and not config.trainer.fast_dev_run:
                runs.prepare(config)

        def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
            try:
                named = self.config_init[self.subcommand].trainer.strategy
                if isinstance(named, str) and "." in named:  # which Lightning would take for a name of its own
                    kwargs["strategy"] = class_of(named)()
                return super().instantiate_trainer(**kwargs)
            except (TypeError, ValueError) as error:  # of an option of the trainer
                raise MisconfigurationException(str(error)) from error

        def after_instantiate_classes(self) -> None:
            trainers.append(self.trainer)
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if self.config[self.subcommand].overwrite and hasattr(callback, "overwrite"):
                    callback.overwrite = True

        def after_fit(self) -> None:
            if self.trainer.is_global_zero:
                print("\n".join(_left(self.trainer)))

    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec")
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LightningCLI's args parameter|in eval mode).*")
    for name in ("utilities.rank_zero", "trainer.connectors.signal_connector"):
        logging.getLogger(f"pytorch_lightning.{name}").addFilter(_is_told)
    try:
        CLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={"callbacks": [PredictionWriter()] if argv[0] == "predict" else []},
            parser_kwargs={name: {"exit_on_error": False} for name in FITTING} | {"exit_on_error": False},
            args=words,
        )
    except argparse.ArgumentError as error:
        raise UserError(f"{told_of_option(error)} (fromage {argv[0]} --help)") from error
    except MisconfigurationException as error:
        raise UserError(f"{' '.join(str(error).split())[:500]} (fromage {argv[0]} --help)") from error
    except ValueError as error:  # jsonargparse's, around what a model's or data module's own check said
        said: BaseException | None = error
        while said is not None and not isinstance(said, UserError):
            said = said.__cause__
        raise said or error from None
    except OSError as error:  # a logger's, or of a configuration that is written beside it
        where = Path(trainers[0].log_dir or trainers[0].default_root_dir) if trainers and not error.filename else None
        if (told := disk_error(error, where, "checkpoints are kept; go on with --ckpt_path last")) is None:
            raise
        raise told from error
    except SIGTERMException as stop:
        if stop.code != INTERRUPTED:
            print(f"fromage: terminated; {_stopped(trainers[0])}", file=sys.stderr)
            raise
        raise KeyboardInterrupt(_stopped(trainers[0])) from None
    except SystemExit as stop:  # Lightning's way with Ctrl-C
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt(*map(_stopped, trainers)) from None


def opening(command: str) -> str:
    """What the help of a command begins with: its use, and the configurations that there are."""
    known = described()
    width = max(map(len, known))
    lines = (f"    {name:{width}}  {what}" for name, what in known.items())
    return HELP.format(command=command, configurations="\n".join(lines))


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


def _is_told(record: logging.LogRecord) -> bool:
    return not any(noise in record.getMessage() for noise in ("litlogger", "Received SIGTERM"))


def _left(trainer: pl.Trainer) -> list[str]:
    """What a fit that came to its end has left, in lines."""
    from fromage.training.run_report import RunReport

    saver: Any = trainer.checkpoint_callback
    saved = saver and (saver.last_model_path or saver.best_model_path)
    lines = [f"checkpoint: {saved} (step {trainer.global_step})"] if saved else []
    folders = [callback.folder for callback in trainer.callbacks if isinstance(callback, RunReport)]  # type: ignore[attr-defined]
    return lines + [f"report: {folder / 'report.md'}" for folder in folders if folder and (folder / "report.md").exists()]


def _stopped(trainer: pl.Trainer) -> str:
    """Where a fit that was stopped can be gone on with."""
    from fromage.checkpoints.run_folder import last_checkpoint

    saver: Any = trainer.checkpoint_callback
    found = last_checkpoint(Path(saver.dirpath)) if saver and saver.dirpath else None
    if trainer.state.fn != "fit" or found is None:
        return "no checkpoint was written"
    step = getattr(trainer.strategy.checkpoint_io, "steps", {}).get(found)
    what = f"saved {found}" if step == trainer.global_step else f"the last checkpoint is {found}"
    return f"{what}{'' if step is None else f' (step {step})'}; the same command with --ckpt_path last goes on"
