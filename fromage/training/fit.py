"""fit, validate, test, predict: Lightning's own commands over any module and data module."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fromage.errors import UserError
from fromage.training.configs import described, with_configs_found
from fromage.training.option_errors import told as told_of_option

if TYPE_CHECKING:
    import pytorch_lightning as pl

FITTING = {  # Lightning's commands, and what each does
    "fit": "Train by a configuration (Lightning's fit)",
    "validate": "Losses and recalls of a checkpoint on the validation data (Lightning's validate)",
    "test": "Evaluate a checkpoint as a configuration such as coco_val.yaml says (Lightning's test)",
    "predict": "Write captions and embeddings of the validation data (Lightning's predict)",
}
HELP = """{command}: run a configuration; options after it override its values

    lightning {command} --config cc3m.yaml --model.lr 1e-4 --trainer.max_steps 1000

{configurations}

--model.help fromage.FromageModule tells the options of a class; --data.help and --trainer.callbacks.help do so too. All
options of Lightning follow, in some seconds.
"""


def run_lightning(argv: list[str]) -> None:
    """fit, validate, test, predict: LightningCLI over any module and data module, configured by files and options.

    Raises:
        UserError: something is wrong with the options, the data or the disk.
        KeyboardInterrupt: after Ctrl-C; the message says what was saved and how to go on.
    """
    words = with_configs_found(argv)  # before anything is imported that takes time
    if {"-h", "--help"} & set(words):
        print(opening(argv[0]), flush=True)
    import pytorch_lightning as pl

    from fromage.training.lightning_cli import CommandLine
    from fromage.training.predictions import PredictionWriter

    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec")
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LightningCLI's args parameter|in eval mode).*")
    for name in ("utilities.rank_zero", "trainer.connectors.signal_connector"):
        logging.getLogger(f"pytorch_lightning.{name}").addFilter(_is_told)
    trainers: list[pl.Trainer] = []
    with _lightnings_signals(), _errors_told(argv[0], trainers):
        CommandLine(
            trainers,
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


@contextmanager
def _lightnings_signals() -> Iterator[None]:
    """Leave SIGTERM to the trainer, which saves a checkpoint; a handler that is there would be called first, and end it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former or signal.SIG_DFL)


@contextmanager
def _errors_told(command: str, trainers: list[pl.Trainer]) -> Iterator[None]:
    """Raise what Lightning raises as `run_lightning` does: one line with the remedy, or where a stopped fit goes on."""
    from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

    from fromage.io import disk_error
    from fromage.training.checkpoint_io import INTERRUPTED

    try:
        yield
    except argparse.ArgumentError as error:
        raise UserError(f"{told_of_option(error)} (fromage {command} --help)") from error
    except MisconfigurationException as error:
        raise UserError(f"{' '.join(str(error).split())[:500]} (fromage {command} --help)") from error
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


def _is_told(record: logging.LogRecord) -> bool:
    return not any(noise in record.getMessage() for noise in ("litlogger", "Received SIGTERM"))


def _stopped(trainer: pl.Trainer) -> str:
    """Where a fit that was stopped can be gone on with."""
    from fromage.checkpoints.run_folder import last_checkpoint

    saver: Any = trainer.checkpoint_callback
    found = last_checkpoint(Path(saver.dirpath)) if saver and saver.dirpath else None
    if trainer.state.fn != "fit" or found is None:
        return "no checkpoint was written"
    step = getattr(trainer.strategy.checkpoint_io, "steps", {}).get(found)
    what = f"saved {found}" if step == trainer.global_step else f"the last checkpoint is {found}"
    return (
        f"{what}{'' if step is None else f' (step {step})'}; the same command goes on, lightning fit with --ckpt_path last"
    )
