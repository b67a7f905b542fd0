"""Where a user's caches and states are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """FROMAGE_CACHE, else fromage in the user's folder of caches. Raises RuntimeError where there is no home."""
    default = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FROMAGE_CACHE") or Path(default, "fromage"))


def state_folder() -> Path:
    """The user's folder of states, fromage in it. Raises RuntimeError where there is no home."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fromage"
