"""Folders of runs: each `fit` has its own, by the versions of Lightning's loggers, with its checkpoints inside.

    runs/cc3m/version_0/               config.yaml, report.md, the logger's events
    runs/cc3m/version_0/checkpoints/   last.ckpt, last-1.ckpt

A run that goes on from the last checkpoint goes on in its folder. A configuration that names a dirpath has the checkpoints
there instead.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fromage.checkpoints.run_folder import goes_on, last_checkpoint, others_checkpoints
from fromage.locks import held

Config = Any  # jsonargparse's Namespace of a subcommand, or of a class: class_path and init_args


def newest(config: Config) -> Path | None:
    """The last checkpoint of the newest run of a configuration; None where there is none, or where only Lightning knows."""
    if folder := _dirpath(config):
        return last_checkpoint(folder)
    logger = _logger(config)
    if logger is None:
        return None
    root, version = _root(logger), logger.get("version")
    return last_checkpoint(root if version is None else root / _folder(version))


def prepare(config: Config) -> None:
    """Give a fit that goes on the folder of its run. Raises UserError for a folder that is another run's, or in use."""
    resumed, folder, logger = config.ckpt_path, _dirpath(config), _logger(config)
    if folder is None and resumed and logger is not None and logger.get("version") is None:
        folder = Path(resumed).parent
        if folder.parent.parent.resolve() != _root(logger).resolve() or not goes_on(folder, resumed):
            return  # a run of its own, which begins where another was
        number = re.fullmatch(r"version_(\d+)", folder.parent.name)
        logger.version = int(number[1]) if number else folder.parent.name
    elif folder is None and logger is not None and logger.get("version") is not None:
        folder = _root(logger) / _folder(logger.version) / "checkpoints"
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    if folder is not None and folder.exists() and not getattr(rank_zero_only, "rank", 0):  # the lock waits for nobody
        with held(folder):
            others_checkpoints(folder, resumed, config.overwrite)


def _dirpath(config: Config) -> Path | None:
    """Where a callback is told to save checkpoints."""
    for callback in _listed(config.trainer.callbacks):
        found = (callback.get("init_args") or {}).get("dirpath")
        if found and "://" not in str(found):
            return Path(found)
    return None


def _logger(config: Config) -> Config | None:
    """The settings of the first logger, if it is one that numbers its runs."""
    settings = next((getattr(logger, "init_args", None) for logger in _listed(config.trainer.logger)), None)
    return settings if settings and all(hasattr(settings, name) for name in ("save_dir", "name", "version")) else None


def _listed(some: Any) -> list[Any]:
    return some if isinstance(some, list) else [] if some is None else [some]


def _root(logger: Config) -> Path:
    return Path(logger.save_dir) / (logger.name or "")


def _folder(version: int | str) -> str:
    return version if isinstance(version, str) else f"version_{version}"
