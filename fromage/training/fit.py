"""fit, validate, test, predict: Lightning's own commands over any module and data module."""

from __future__ import annotations

import argparse
import logging
import re
import warnings
from importlib import import_module
from inspect import signature

from fromage.errors import UserError
from fromage.training.configs import near, with_configs_found

FITTING = ("fit", "validate", "test", "predict")


def fitting(argv: list[str]) -> None:
    """fit, validate, test, predict: LightningCLI over any module and data module, configured by files and options."""
    import pytorch_lightning as pl
    from pytorch_lightning.cli import LightningCLI

    from fromage.checkpoints.lightning import read_checkpoint

    class CLI(LightningCLI):
        """Looks at the checkpoint before anything is loaded, and lets options count, not the checkpoint's own ones."""

        def _parse_ckpt_path(self) -> None:
            pass

        def before_instantiate_classes(self) -> None:
            path = self.config[self.subcommand].get("ckpt_path")
            if path and path not in ("last", "best", "hpc", "registry"):
                read_checkpoint(path)

    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec")
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LightningCLI's args parameter|in eval mode).*")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    try:
        CLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={name: {"exit_on_error": False} for name in FITTING} | {"exit_on_error": False},
            args=with_configs_found(argv),
        )
    except argparse.ArgumentError as error:
        raise UserError(_told(error, argv[0])) from error
    except ValueError as error:  # jsonargparse's, around what a model's or data module's own check said
        said: BaseException | None = error
        while said is not None and not isinstance(said, UserError):
            said = said.__cause__
        raise said or error from None


def _told(error: argparse.ArgumentError, command: str) -> str:
    """What was wrong, in a line, and the option that was probably meant."""
    said = " ".join(str(error).split())
    unknown = re.search(r"Problem with given class_path '([\w.]+)': Option '([\w.]+)' is not accepted", said)
    if unknown:
        section = "model" if 'key "model"' in said else "data"
        said = f"{section}.{unknown[2]}: {unknown[1]} has no such option" + near(
            unknown[2], _options(unknown[1]), f"--{section}."
        )
    elif unknown := re.search(r"unrecognized arguments: --trainer\.(\w+)", said):
        said += near(unknown[1], _options("pytorch_lightning.Trainer"), "--trainer.")
    return f"{said[:500]} (fromage {command} --help)"


def _options(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return list(signature(getattr(import_module(module), name)).parameters)
