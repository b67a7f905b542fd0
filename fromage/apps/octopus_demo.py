"""Octopus on the toy world: the three stages one after another, and the sequential counterpart."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fromage.apps.tours import CHECKPOINT, finished, once
from fromage.io import write_files
from fromage.toy.world import VERSION, make_world
from fromage.training.configs import find_config
from fromage.training.fit import run_lightning

HOME = "runs/octopus"  # where the configurations put everything
PLACES = re.compile(rf"{HOME}(/world|/patches)?")
COUNTS: dict[str, Any] = {"refs": 6000, "train": 1000, "val": 200, "stories": 1, "dialogues": 1}  # of the toy world
STAGES = ("octopus_toy1.yaml", "octopus_toy2.yaml", "octopus_toy3.yaml")
SPOTTING = "Describe the image with positions."  # how the configurations ask for a caption with boxes
SEQUENTIAL = ("octopus_toy3.yaml", "octopus_sequential.yaml")


def toy_checkpoint(out: Path) -> Path:
    """The last stage's checkpoint in the folder `out`, trained first where there is none."""
    checkpoint = trained(out)
    if checkpoint is None:
        print(f"no checkpoint is given: training a toy Octopus in {out}, one to two hours", flush=True)
        checkpoint = tour(out)
    return checkpoint


def tour(
    out: Path,
    options: Sequence[str] | None = None,
    shared: Path | None = None,
    stages: int = len(STAGES),
    first: Path | None = None,
) -> Path:
    """Make the world and train the first stages in the folder `out`; returns the last one's checkpoint.

    options: further words for every `lightning fit`, as of `once`. shared: folder of the world and its patches, in place of
    `out`. first: a checkpoint of stage 1, which is then not trained here.
    """
    make(shared or out)
    checkpoint = first
    for stage, config in list(enumerate(STAGES[:stages], 1))[first is not None :]:
        begin = [f"--model.init={checkpoint}"] if checkpoint else []
        checkpoint = train_once(out, f"stage{stage}", (config,), options, shared, begin)
    assert checkpoint
    return checkpoint


def make(out: Path) -> None:
    """The world, in a folder; one of this version and as many referring images that is there will do."""
    try:
        there = json.loads((out / "world" / "world.json").read_text(encoding="utf-8"))
        found = there["version"], there["counts"]["refs"]
    except (OSError, ValueError, LookupError, TypeError):
        found = None  # none is there, or make_world says what is
    if found != (VERSION, COUNTS["refs"]):
        make_world(out / "world", **COUNTS)


def sequential(
    out: Path, options: Sequence[str] | None = None, shared: Path | None = None, first: Path | None = None
) -> Path:
    """Train the sequential counterpart in the folder `out`, from a checkpoint of stage 1; None: that of `out`."""
    if trained(out, "sequential") is None and first is None:
        first = tour(out, options, shared, stages=1)
    return train_once(out, "sequential", SEQUENTIAL, options, shared, [f"--model.init={first}"])


def train_once(
    out: Path,
    name: str,
    configs: Sequence[str],
    options: Sequence[str] | None = None,
    shared: Path | None = None,
    begin: Sequence[str] = (),
) -> Path:
    """Train what saves its checkpoints in the folder out / name, unless it came to its end before; what was killed goes on.

    begin: words that come before the options, and that another call may have in another form. Returns the checkpoint.
    Raises UserError as `once` does.
    """
    return once(out / name, options, lambda again: train(out, configs, [*begin, *(options or ()), *again], shared))


def trained(out: Path, name: str = "stage3") -> Path | None:
    """The checkpoint in the folder out / name, if it is that of a run that came to its end."""
    return finished(out / name)


def train(out: Path, configs: Sequence[str], options: Sequence[str] = (), shared: Path | None = None) -> None:
    """`lightning fit` with configurations whose paths begin in `out`, or in `shared`, in place of runs/octopus.

    Checkpoints are out / RUN / CHECKPOINT; those of a run that is not gone on with are replaced.
    """
    placed = {}
    for name in configs:  # the last one names the run
        text = Path(find_config(name)).read_text(encoding="utf-8")
        placed[name] = PLACES.sub(lambda found: f"{(shared or out) if found[1] else out}{found[1] or ''}", text)
    write_files(out / "configs", {name: text.encode() for name, text in placed.items()})
    run = yaml.safe_load(text)["trainer"]["logger"]["init_args"]["name"]
    words = [f"--trainer.callbacks.init_args.dirpath={out / run / CHECKPOINT.parent}", "--overwrite", *options]
    run_lightning(["fit", *(word for name in configs for word in ("--config", str(out / "configs" / name))), *words])
