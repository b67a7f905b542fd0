"""Figures of a study: runs by row and seed, each with its commit and machine, in one JSON file that later runs add to."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from gpu_kit import commit

from fromage.allocator import keep_freed_memory
from fromage.errors import UserError
from fromage.io import digest_of, write_json
from fromage.processor import described
from fromage.training.configs import find_config

Figures = dict[str, float]  # by name, shares in percent
# commit (of the measurement), machine, torch, setting: what the figures depend on beside the seed, figures: Figures; of a
# trained model checkpoint: its digest, and trained: commits of the training
Run = dict[str, Any]
Runs = dict[str, dict[str, Run]]  # by row and seed
RECORD = "commits.json"  # what a run's folder says of its training


def begin(threads: int) -> None:
    """Set the number of threads, and keep freed memory, as `lightning fit` does."""
    keep_freed_memory()
    torch.set_num_threads(threads)


def machine() -> str:
    """The processor, and how many threads of it."""
    model = re.search(r"model name\s*:\s*(.+)", described())
    return f"{model[1].strip() if model else platform.machine()}, {torch.get_num_threads()} threads"


def configs(*names: str) -> dict[str, str]:
    """A digest of what each configuration says, whatever its comments."""
    said = {name: yaml.safe_load(Path(find_config(name)).read_text(encoding="utf-8")) for name in names}
    return {name: hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()[:16] for name, each in said.items()}


def trained(folder: Path, fit: Callable[[], Path], ended: bool, figures: Iterable[Path], **setting: Any) -> tuple[Path, Run]:
    """The checkpoint of a row's run with one seed, and {'checkpoint': its digest, 'trained': commits of its training}.

    The folder keeps the setting of the training, and the commits at which it was begun and gone on with.

    Args:
        folder: of the run.
        fit: trains, unless that is done, and returns the checkpoint.
        ended: whether the run has come to its end, so that `fit` trains nothing.
        figures: files of what was measured of it.
        setting: what the training depends on, beside the seed.

    Raises:
        UserError: there are figures, and their checkpoint is gone; or the training was begun in another setting.
    """
    left = [] if ended else [file for file in figures if file.exists()]
    if left:
        raise UserError(f"{left[0]}: the checkpoint of these figures is gone; remove the file, and they are made again")
    record = _record(folder) if any(folder.rglob("*.ckpt")) else {"commits": [], "setting": setting}
    if "setting" not in record:
        print(f"{folder}: an earlier version did not note the setting of this training; taken to be {setting}", flush=True)
        record["setting"] = setting
    _require(record["setting"], setting, f"{folder} holds a training", "give that again, or remove it")
    if not ended:
        commits = list(dict.fromkeys([*record["commits"], commit()]))
        write_json(folder / RECORD, {"commits": commits, "setting": setting})
        record["commits"] = commits
    checkpoint = fit()
    named = {"trained": record["commits"]} if record["commits"] else {}  # none: of an earlier version
    return checkpoint, {"checkpoint": digest_of(checkpoint)[:16]} | named


def _record(folder: Path) -> dict[str, Any]:
    """What a run's folder says of its training; earlier versions said the commits alone, or nothing."""
    file = folder / RECORD
    said = json.loads(file.read_text()) if file.exists() else []
    return {"commits": said} if isinstance(said, list) else said


def _require(there: Any, setting: Mapping[str, Any], holds: str, remedy: str) -> None:
    """Raise UserError where what a place holds is of another setting."""
    if json.dumps(there, sort_keys=True) != json.dumps(setting, sort_keys=True):
        raise UserError(f"{holds} of {there}, this is of {dict(setting)}: {remedy}")


def measured(path: Path, measure: Callable[[], Figures], checkpoint: str | None = None, **setting: Any) -> Run:
    """The run of a file; where there is none, `measure` makes its figures.

    A file of an earlier version, which says neither setting nor checkpoint, is made again.

    Args:
        path: the file.
        measure: makes the figures.
        checkpoint: digest of the checkpoint that is judged; None: they are of none.
        setting: what else they depend on, beside the seed.

    Raises:
        UserError: the file's figures are of another checkpoint or setting.
    """
    run = json.loads(path.read_text()) if path.exists() else {}
    if run and not {"setting", *(["checkpoint"] if checkpoint else [])} <= run.keys():
        print(f"{path}: an earlier version did not note what these figures are of; they are made again", flush=True)
        run = {}
    of = {"checkpoint": checkpoint, "setting": setting} if checkpoint else {"setting": setting}
    if not run:
        run = {"commit": commit(), "machine": machine(), "torch": torch.__version__, **of, "figures": measure()}
        write_json(path, run)
    _require({key: run[key] for key in of}, of, f"{path} holds figures", "give that again, or remove the file")
    return json.loads(path.read_text())


def alike(row: str, seeds: Mapping[str, Run]) -> dict[str, dict[str, Run]]:
    """The runs of a row, those of one setting together, by the row's name; of several settings also by their seeds.

    A run that does not say its setting stands alone.
    """
    groups: list[dict[str, Run]] = []
    for seed, run in seeds.items():
        same = (some for some in groups for one in some.values() if one.get("setting", one) == run.get("setting"))
        group = next(same, None)
        if group is None:
            groups.append({seed: run})
        else:
            group[seed] = run
    return {f"{row} ({', '.join(some)})" if len(groups) > 1 else row: some for some in groups}


def collect(path: Path | None, runs: Runs, **setting: Any) -> Runs:
    """Runs, and those that a file has beside them, written into it; `setting` is what all have in common.

    The file's setting stays as it is, and so do the figures of other rows. Raises UserError where it names another setting.
    """
    if path is None:
        return runs
    there = json.loads(path.read_text()) if path.exists() else {"setting": setting, "runs": {}, "figures": {}}
    asked = {key: setting.get(key) for key in there["setting"]}
    _require(there["setting"], asked, f"{path} holds runs", "name another file")
    known, figures = there["runs"], there["figures"]
    runs = {row: dict(sorted((known.get(row, {}) | seeds).items())) for row, seeds in runs.items()}
    for row, seeds in runs.items():
        former = {row, *alike(row, known.get(row, {}))}
        figures = {name: found for name, found in figures.items() if name not in former}
        figures |= {name: spread(some) for name, some in alike(row, seeds).items()}
    runs = known | runs
    write_json(path, {"setting": there["setting"], "runs": runs, "figures": figures})
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

    shown: heading of each figure by its name. A figure that not all seeds have is marked by their number. A row of several
    settings is several rows. Under the table stand the commits of rows that are of more than one.
    """
    rows, told = [["", *shown.values(), "seeds"], ["---"] * (len(shown) + 2)], []
    for row, seeds in (group for name, runs_of in runs.items() for group in alike(name, runs_of).items()):
        figures = spread(seeds)
        rows.append([row, *(_cell(name, figures.get(name), seeds) for name in shown), ", ".join(seeds)])
        if len(commits := sorted({each for run in seeds.values() for each in _commits(run)})) > 1:
            told.append(f"\n{row}: commits {', '.join(commits)}")
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), *told])


def _commits(run: Run) -> set[str]:
    """Commits of a run: those of its training, and those at which it was measured."""
    return {*run.get("trained", []), *run.get("later", {}).values(), *([run["commit"]] if "commit" in run else [])}


def _cell(name: str, value: Mapping[str, float] | None, seeds: Mapping[str, Run]) -> str:
    """A figure of a row, in words."""
    if value is None:
        return ""
    having = sum(name in run["figures"] for run in seeds.values())
    told = f"{value['mean']:.1f}" + f" ± {value['deviation']:.1f}" * (having > 1)
    return told + f" ({having} of {len(seeds)})" * (having < len(seeds))
