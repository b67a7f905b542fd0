"""A measurement in a process of its own, so that neither its memory nor its settings reach another one."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from fromage.allocator import OPTION, keep_freed_memory


def used(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the CPU that work takes, those of the system among them, and the most bytes that were ever resident."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return {"seconds": user + system, "system": system, "resident": after.ru_maxrss * 1024}


def tell(found: dict[str, float]) -> None:
    """Hand a measurement over to the process that asked for it."""
    print(json.dumps(found))


def measured(file: str, *words: str, plain: bool) -> dict[str, float]:
    """What `file --measure WORDS` tells; plain: with glibc's allocator as it is, which `allocated_as_asked` leaves then."""
    given = os.environ | {OPTION: "system" if plain else ""}
    out = subprocess.run(
        [sys.executable, file, "--measure", *words], env=given, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def allocated_as_asked() -> None:
    """To be called first in the measuring process. Exits where the allocator cannot be told."""
    if not keep_freed_memory() and os.environ.get(OPTION) != "system":
        sys.exit("the allocator is left alone here: another C library, or the environment decides")
