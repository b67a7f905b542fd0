"""Time the command line from its start to its first words, and to its end.

    python tools/bench_startup.py

Each command runs in a process of its own, as a user gives it; medians. The first round, which reads files from the disk,
does not count. `lightning fit --help` says what it is and which configurations there are before it imports PyTorch, and then
lists the options of Lightning.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from study import machine

from fromage.io import write_json

COMMANDS = {
    "fromage --help": ["-m", "fromage.cli", "--help"],
    "fromage search --help": ["-m", "fromage.cli", "search", "--help"],
    "lightning fit --help": ["-m", "fromage.cli", "fit", "--help"],
    "import fromage": ["-c", "import fromage; print()"],
}


def timed(words: list[str]) -> tuple[float, float]:
    """Seconds of a run of Python to its first character of output, and to its end."""
    start = perf_counter()
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        began = perf_counter() - start
        process.stdout.read()
    if process.returncode or not first:
        raise SystemExit(f"{' '.join(words)}: ended with {process.returncode}")
    return began, perf_counter() - start


def main() -> None:
    """Read the command line, measure, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the report")
    args = parser.parse_args()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(args.rounds + 1):
        for name, words in COMMANDS.items():
            taken[name].append(timed(words))
    report = {
        name: dict(zip(("first_words", "end"), map(statistics.median, zip(*runs[1:], strict=True)), strict=True))
        for name, runs in taken.items()
    }
    for name, seconds in report.items():
        print(f"{name:24} {seconds['first_words']:6.2f} s to the first words, {seconds['end']:6.2f} s to the end")
    if args.json:
        write_json(args.json, {"machine": machine(), "seconds": report})


if __name__ == "__main__":
    main()
