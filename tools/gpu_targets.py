"""What the GPU kit's figures should reach on an H100 or H200, in one table."""

from __future__ import annotations

from typing import Any, NamedTuple


class Target(NamedTuple):
    """One figure to reach.

    Attributes:
        name: what it is, with its unit.
        part: the kit's part that measures it.
        path: where it stands in the part's figures.
        at_most: whether the bound is one from above.
    """

    name: str
    part: str
    path: tuple[str, ...]
    at_most: bool
    bound: float


TARGETS = (
    Target("fast step at batch 180, s", "3", ("seconds", "fast"), True, 0.30),
    Target("from stored features, s", "3", ("seconds", "stored features"), True, 0.22),
    Target("reference : fast, time of a step", "3", ("speedup",), False, 4.0),
    Target("reference : stored features, time of a step", "3", ("speedup_stored_features",), False, 6.0),
    Target("fast : reference, memory above the weights", "3", ("peak_memory_ratio",), True, 0.40),
    Target("plan against measured peaks, largest share it is off by", "4", ("worst", "whole"), True, 0.15),
    Target("the same above weights, optimiser and batch", "4", ("worst", "above"), True, 0.15),
    Target("host synchronisations in a fast step", "5", ("host_synchronisations",), True, 0),
)


def judged(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target beside what was found; met is None where nothing was. figures: by the part's number."""
    rows = []
    for target in TARGETS:
        found: Any = figures.get(target.part, {})
        for key in target.path:
            found = found.get(key) if isinstance(found, dict) else None
        met = None if found is None else bool(found <= target.bound if target.at_most else found >= target.bound)
        wanted = f"{'<=' if target.at_most else '>='} {target.bound:g}"
        rows.append({"target": target.name, "wanted": wanted, "found": found, "met": met})
    return rows
