"""Figures of a study: runs by row and seed, each with its commit and machine, in one JSON file that later runs add to."""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_kit import commit

from fromage.allocator import keep_freed_memory
from fromage.errors import UserError
from fromage.io import write_json
from fromage.processor import described

Figures = dict[str, float]  # by name, shares in percent
Run = dict[str, Any]  # commit (of the measurement), machine, torch, and figures: Figures; trained: commits of the training
Runs = dict[str, dict[str, Run]]  # by row and seed


def begin(threads: int) -> None:
    """Set the number of threads, and keep freed memory, as `lightning fit` does."""
    keep_freed_memory()
    torch.set_num_threads(threads)


def machine() -> str:
    """The processor, and how many threads of it."""
    model = re.search(r"model name\s*:\s*(.+)", described())
    return f"{model[1].strip() if model else platform.machine()}, {torch.get_num_threads()} threads"


def trained_at(folder: Path, ended: bool) -> Run:
    """{'trained': the commits at which a run was begun and gone on with}, kept in its folder; called before it is trained.

    ended: whether it has come to its end, so that nothing is trained now. Without a file, of a run that has ended: {}.
    """
    file = folder / "commits.json"
    known = json.loads(file.read_text()) if file.exists() else []
    if not ended and commit() not in known[-1:]:
        known.append(commit())
        write_json(file, known)
    return {"trained": known} if known else {}


def measured(path: Path, measure: Callable[[], Figures], **setting: Any) -> Run:
    """The run of a file; where there is none, `measure` makes its figures. setting: what they depend on.

    Raises UserError where the file's figures were made in another setting.
    """
    if not path.exists():
        origin = {"commit": commit(), "machine": machine(), "torch": torch.__version__}
        write_json(path, {**origin, "setting": setting, "figures": measure()})
    run = json.loads(path.read_text())
    there = run.get("setting", setting)
    if there != json.loads(json.dumps(setting)):
        raise UserError(f"{path} holds figures of {there}, these are of {setting}: give it again, or remove the file")
    return run


def collect(path: Path | None, runs: Runs, **setting: Any) -> Runs:
    """Runs, and those that a file has beside them, written into it; `setting` is what all have in common.

    Raises UserError where the file's runs were made in another setting, or runs of one row with other options each.
    """
    if path is None:
        return runs
    there = json.loads(path.read_text()) if path.exists() else {"setting": setting, "runs": {}}
    if there["setting"] != json.loads(json.dumps(setting)):
        raise UserError(f"{path} holds runs of {there['setting']}, these are of {setting}: name another file")
    known = there["runs"]
    runs = known | {row: dict(sorted((known.get(row, {}) | seeds).items())) for row, seeds in runs.items()}
    for row, seeds in runs.items():
        options = [run["setting"].get("options") for run in seeds.values() if "setting" in run]
        if any(each != options[0] for each in options):
            told = " and ".join(map(str, options))
            raise UserError(f"{path}: row {row} would hold runs with other options each ({told}): name another file")
    write_json(path, {"setting": setting, "runs": runs, "figures": {row: spread(seeds) for row, seeds in runs.items()}})
    return runs


def every(
    rows: Sequence[str], seeds: Sequence[int], run: Callable[[str, int], Run], path: Path | None, **setting: Any
) -> Runs:
    """Run each row with each seed; the file has each as soon as it is done, and is refused before the first if need be.

    Returns what `collect` does.
    """
    collect(path, {}, **setting)
    runs: Runs = {name: {} for name in rows}
    for seed in seeds:
        for name in rows:
            runs[name][str(seed)] = run(name, seed)
            collect(path, {name: runs[name]}, **setting)
    return collect(path, runs, **setting)


def spread(seeds: Mapping[str, Run]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of every figure over the seeds that have it."""
    values: dict[str, list[float]] = {}
    for run in seeds.values():
        for name, value in run["figures"].items():
            values.setdefault(name, []).append(value)
    return {
        name: {"mean": statistics.fmean(some), "deviation": statistics.stdev(some) if len(some) > 1 else 0.0}
        for name, some in values.items()
    }


def table(shown: Mapping[str, str], runs: Runs) -> str:
    """Rows of a Markdown table: seeds, and of each figure the mean, and after ± the deviation of several.

    shown: heading of each figure by its name. A figure that not all seeds have is marked by their number.
    """
    rows = [["", *shown.values(), "seeds"], ["---"] * (len(shown) + 2)]
    for row, seeds in runs.items():
        figures = spread(seeds)
        rows.append([row, *(_cell(name, figures.get(name), seeds) for name in shown), ", ".join(seeds)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(name: str, value: Mapping[str, float] | None, seeds: Mapping[str, Run]) -> str:
    """A figure of a row, in words."""
    if value is None:
        return ""
    having = sum(name in run["figures"] for run in seeds.values())
    told = f"{value['mean']:.1f}" + f" ± {value['deviation']:.1f}" * (having > 1)
    return told + f" ({having} of {len(seeds)})" * (having < len(seeds))
