"""fit, validate, test, predict: Lightning's own commands over any module and data module."""

from __future__ import annotations

import argparse
import logging
import warnings

from fromage.errors import UserError
from fromage.training.configs import with_configs_found

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
        raise UserError(" ".join(str(error).split())[:500] + " (fromage " + argv[0] + " --help)") from error
    except ValueError as error:  # jsonargparse's, around what a model's or data module's own check said
        said: BaseException | None = error
        while said is not None and not isinstance(said, UserError):
            said = said.__cause__
        raise said or error from None
