"""mypy on programs that use the package, without the types of other libraries: those take minutes to read."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = (
    "--config-file=",
    "--ignore-missing-imports",
    "--no-site-packages",
    "--follow-imports=silent",
    "--check-untyped-defs",
)


def type_check(*programs):
    """The finished process of mypy on some files."""
    words = [sys.executable, "-m", "mypy", *FLAGS, f"--cache-dir={programs[0].parent / 'types'}", *map(str, programs)]
    return subprocess.run(words, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True)
