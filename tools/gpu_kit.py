"""Measure the whole product on one GPU in eight minutes.

    python3 tools/gpu_kit.py OUT                   # all parts within 480 seconds; figures in OUT/results.json
    python3 tools/gpu_kit.py OUT --only 3,4        # some of them
    python3 tools/gpu_kit.py OUT --dry-run         # all of it, tiny, on a CPU
    python3 tools/gpu_report.py OUT/results.json   # tables

Parts, in this order: 1 environment, 2 `pytest -m gpu`, 3 the training step, 4 `fromage plan` beside the memory that 3 has
measured, 5 a profile of the fast step, 6 generation, 7 image search, 8 Octopus, 9 a small model. Each runs in a process of
its own with a time limit, so that one that hangs, fails or runs out of memory leaves the others alone. Figures are written
as they come, each time to a new file that then takes the old one's name: a run that is cut off leaves what it had. The
budget is shared out by priority; what a part leaves over goes to those after it. The log of all parts is OUT/kit.log.

A bare machine with PyTorch and transformers but no network lacks some packages. Where there is a network:

    python tools/gpu_kit.py --wheels DIR           # collects them for Python 3.12 on x86-64, at most 64 MiB

and on the machine either of

    python3 tools/gpu_kit.py OUT --from-wheels DIR  # unpacks them into a temporary folder that goes first on sys.path
    python3 -m pip install --no-index --no-deps --target SITE DIR/*.whl && PYTHONPATH=SITE python3 tools/gpu_kit.py OUT
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import gpu_wheels
from gpu_targets import judged

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 480.0  # seconds
POLL = 0.1  # seconds between two looks at a part
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
RUNNING, DONE, FAILED, LATE, SKIPPED, WAITING = "running", "done", "failed", "timed out", "skipped", "not reached"
Call = Callable[[Any, Callable[[dict[str, Any]], None]], dict[str, Any]]  # a part: task and save -> figures


@dataclass(frozen=True)
class Part:
    """One part. call: its function in gpu_parts. limit: seconds at most; least: seconds under which it is not begun."""

    name: str
    call: str
    limit: float
    least: float


PARTS = {
    "1": Part("environment", "environment", 20, 5),
    "2": Part("tests on the card", "tests", 130, 30),
    "3": Part("training step", "step", 200, 60),
    "4": Part("plan", "planned", 60, 15),
    "5": Part("profile of a fast step", "profile", 60, 20),
    "6": Part("generation", "generation", 90, 20),
    "7": Part("image search", "index", 90, 20),
    "8": Part("Octopus", "octopus", 120, 40),
    "9": Part("small model", "small", 70, 20),
}
PRIORITY = "134265879"


def shares(numbers: Sequence[str], budget: float, parts: dict[str, Part] | None = None) -> dict[str, float]:
    """Seconds of each part. By priority each first gets its least, or nothing; what is left then fills up the limits."""
    parts, left = parts or PARTS, budget
    given = dict.fromkeys(numbers, 0.0)
    ranked = sorted(numbers, key=PRIORITY.index)
    for number in ranked:
        if left >= parts[number].least:
            given[number] = parts[number].least
            left -= parts[number].least
    for number in ranked:
        if given[number]:
            more = min(parts[number].limit - given[number], left)
            given[number] += more
            left -= more
    return given


def write(file: Path, content: dict[str, Any]) -> None:
    """As JSON, whole or not at all."""
    beside = file.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    beside.replace(file)


class Results:
    """The file of a run: what it is, and every part with its state and figures."""

    def __init__(self, folder: Path, about: dict[str, Any], numbers: Sequence[str], parts: dict[str, Part]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.part_file, self.log = folder / "results.json", folder / "part.json", folder / "kit.log"
        self.parts = {number: {"name": parts[number].name, "status": WAITING} for number in numbers}
        self.content: dict[str, Any] = {**about, "parts": self.parts}
        self.read: int | None = None  # when the part's file was last written
        self.write()

    def update(self, number: str, **entry: Any) -> None:
        """Change what is known of a part."""
        self.parts[number] |= entry
        self.write()

    def take_in(self, number: str) -> None:
        """What the running part has kept, if that is new."""
        when = self.part_file.stat().st_mtime_ns if self.part_file.exists() else None
        if when is not None and when != self.read:
            self.read = when
            self.update(number, **json.loads(self.part_file.read_text(encoding="utf-8")))

    def write(self) -> None:
        """The file, again."""
        self.content["targets"] = judged(self.figures)
        write(self.file, self.content)

    @property
    def figures(self) -> dict[str, Any]:
        """By the parts' numbers, of those that have some."""
        return {number: entry["figures"] for number, entry in self.parts.items() if "figures" in entry}


def child(call: Call, task: Any, part_file: Path) -> None:
    """Run a part and keep its figures, its error or both in a file."""
    kept: dict[str, Any] = {}

    def save(figures: dict[str, Any]) -> None:
        kept["figures"] = figures
        write(part_file, kept)

    try:
        save(call(task, save))
        kept["status"] = DONE
    except BaseException as error:
        message = f"{type(error).__name__}: {error}".strip()
        kept |= {"status": FAILED, "error": message[:1000], "traceback": traceback.format_exc()[-3000:]}
        traceback.print_exc()
    write(part_file, kept)


def fork(call: Call, task: Any, results: Results, again: list[str] | None) -> int:
    """Start a part in a process and a group of its own; returns its id. Its output goes to the log.

    again: the command that runs it from the start, for where CUDA has been asked in this process and a fork cannot use it.
    """
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        log = os.open(results.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)  # whatever these were; a fork has no end that flushes
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch = sys.modules.get("torch")
        if again and torch is not None and torch.cuda._is_in_bad_fork():
            os.execv(again[0], again)
        child(call, task, results.part_file)
    finally:
        os._exit(0)


def end(pid: int) -> None:
    """End a part and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):  # one that has no group of its own yet
        os.kill(pid, signal.SIGKILL)


def run_part(number: str, call: Call, task: Any, seconds: float, results: Results, again: list[str] | None = None) -> None:
    """Run a part for so many seconds at most, and file what came of it."""
    results.part_file.unlink(missing_ok=True)
    results.read, began, state = None, time.monotonic(), 0
    results.update(number, status=RUNNING, limit=round(seconds, 1))
    pid, ended = fork(call, task, results, again), 0
    try:
        while not ended and time.monotonic() - began < seconds:
            time.sleep(POLL)
            results.take_in(number)
            ended, state = os.waitpid(pid, os.WNOHANG)
    finally:
        end(pid)
        if not ended:
            os.waitpid(pid, 0)
    results.take_in(number)
    taken = round(time.monotonic() - began, 1)
    if not ended:
        results.update(number, status=LATE, error=f"stopped after {seconds:.0f} s")
    elif results.parts[number]["status"] == RUNNING:
        results.update(number, status=FAILED, error=f"its process ended by itself, state {state}")
    results.update(number, seconds=taken)
    results.part_file.unlink(missing_ok=True)


def run_all(
    calls: dict[str, Call], task: Any, results: Results, budget: float, parts: dict[str, Part], again: Any = None
) -> None:
    """All parts in order, within the budget in seconds, counted from now. again: number -> the command to run it afresh."""
    began, left = time.monotonic(), list(calls)
    while left:
        share = shares(left, budget - (time.monotonic() - began), parts)
        number = left.pop(0)
        if not share[number]:
            results.update(number, status=SKIPPED, error="the budget has no time for it")
            continue
        task.results = results.figures
        run_part(number, calls[number], task, share[number], results, again and again(number))
        entry = results.parts[number]
        print(
            f"{number} {entry['name']}: {entry['status']} after {entry['seconds']} s  {entry.get('error', '')}", flush=True
        )


def commit() -> str:
    """Of the working tree, marked where it differs; 'unknown' where there is no git."""
    try:
        ask = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def options(words: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="folder for results.json and kit.log")
    parser.add_argument("--only", default="".join(PARTS), help="numbers of parts, such as 3,4")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all parts together")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--commit", help="what to write down as the commit, where there is no git")
    parser.add_argument("--from-wheels", type=Path, metavar="DIR", help="folder of wheels to import from")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="collect wheels for a bare machine there, and end")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # run this one here: see fork
    args = parser.parse_args(words)
    args.only = [number for number in args.only if number != ","]
    if args.out is None and not args.wheels:
        parser.error("name a folder for the results, or --wheels DIR")
    if unknown := [number for number in args.only if number not in PARTS]:
        parser.error(f"--only: there is no part {', '.join(unknown)}; the parts are 1 to {len(PARTS)}")
    args.only = [number for number in PARTS if number in args.only]
    return args


def main(words: list[str] | None = None) -> int:
    """Read the command line and run; returns the exit status, 0 where every part is done."""
    args = options(words)
    if args.wheels:
        return gpu_wheels.collect(args.wheels)
    began = time.monotonic()
    command = shlex.join(["python3", "tools/gpu_kit.py", *(sys.argv[1:] if words is None else words)])
    about = {"kit": 1, "command": command, "commit": args.commit or commit(), "dry_run": args.dry_run}
    about |= {"started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "budget": args.budget}
    if args.part is None:
        results = Results(args.out, about, args.only, PARTS)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    sys.path[:0] = [str(ROOT), *gpu_wheels.unpacked(args.from_wheels)]
    try:
        import gpu_parts  # once, before the parts are forked; CUDA is asked in them alone
    except Exception as error:
        if args.part is None:
            for number in args.only:
                results.update(number, status=FAILED, error=f"the kit cannot be imported: {type(error).__name__}: {error}")
        raise

    if args.part is not None:
        known = json.loads((args.out / "results.json").read_text(encoding="utf-8"))["parts"]
        task = gpu_parts.Task(args.dry_run, {n: entry["figures"] for n, entry in known.items() if "figures" in entry})
        child(getattr(gpu_parts, PARTS[args.part].call), task, args.out / "part.json")
        return 0
    signal.signal(signal.SIGTERM, leave)
    given = sys.argv[1:] if words is None else words
    again = lambda number: [sys.executable, str(Path(__file__).resolve()), *given, "--part", number]  # noqa: E731
    calls = {number: getattr(gpu_parts, PARTS[number].call) for number in args.only}
    run_all(calls, gpu_parts.Task(args.dry_run, {}), results, args.budget - (time.monotonic() - began), PARTS, again)
    print(f"{results.file}: python3 tools/gpu_report.py {results.file}")
    return int(any(entry["status"] != DONE for entry in results.parts.values()))


def leave(*signals: Any) -> NoReturn:
    """On SIGTERM, end the running part too."""
    sys.exit(143)


if __name__ == "__main__":
    sys.exit(main())
