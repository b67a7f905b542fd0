"""Reports printed: a table for the terminal, rows for a Markdown table. What a report holds is said in base.make_report."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

from tabulate import tabulate

Figures = dict[str, float]  # by name, such as r1; shares in percent
System = dict[str, Figures]  # of one system, by setting
Report = dict[str, Any]

SYSTEMS = ("fromage", "octopus", "sequential", "clip", "clip image", "clip text", "chance")


def table(report: Report) -> str:
    """A table for each kind of figures, published ones in brackets, between what was evaluated and the protocol.

    Where other systems' published rows stand beside ours, each setting has a table of its own.
    """
    sizes = ", ".join(f"{name} {value}" for name, value in report.items() if isinstance(value, int))
    skipped = ", ".join(f"{count} {what}" for what, count in report["skipped"].items() if count) or "nothing"
    blocks = [f"{report['evaluation']}: {report['data']}\n{sizes}; skipped: {skipped}"]
    others = _others(report)
    systems = [*_systems(report), *others]
    rows = [(at, who) for at in _settings(report) for who in systems if at in report.get(who, report["paper"].get(who, {}))]
    for (names, _), some in groupby(rows, key=lambda row: (_names(report, row[0]), row[0] if others else "")):
        cells = [[at, who, *(_cell(report, who, at, name) for name in names)] for at, who in some]
        align = ("left", "left", *["right"] * len(names))
        blocks.append(tabulate([["", "", *names], *cells], tablefmt="plain", colalign=align, disable_numparse=True))
    return "\n\n".join([*blocks, "\n".join(f"{topic}: {text}" for topic, text in report["protocol"].items())])


def _systems(report: Report) -> list[str]:
    return [who for who in SYSTEMS if who in report]


def _others(report: Report) -> list[str]:
    """Systems of others, whose figures are published; where nothing was evaluated, all that have such."""
    return [who for who in report["paper"] if who not in _systems(report)]


def _evaluated(report: Report) -> list[System]:
    return [report[who] for who in _systems(report)] or list(report["paper"].values())


def _settings(report: Report) -> list[str]:
    return list(dict.fromkeys(at for system in _evaluated(report) for at in system))


def _names(report: Report, setting: str) -> list[str]:
    """The figures of a setting, as the first system that has it gives them."""
    return next(list(system[setting]) for system in _evaluated(report) if setting in system)


def _cell(report: Report, who: str, setting: str, *names: str) -> str:
    """Figures of a system, those of `names` that it has, and in brackets the published ones, - for one that is not."""
    ours, published = report.get(who, {}).get(setting, {}), report["paper"].get(who, {}).get(setting, {})
    own = " / ".join(shown(name, ours[name]) for name in names if name in ours)
    known = {name: as_published(published[name]) for name in names if name in published}
    theirs = " / ".join(known.get(name, "-") for name in names) if known else ""
    return " ".join(filter(None, [own, theirs and f"({theirs})"]))


def shown(name: str, value: float) -> str:
    """A figure for a table: seconds with three digits, all else with one decimal."""
    return f"{value:.3g}" if name.startswith("seconds") else f"{value:.1f}"


def as_published(value: float) -> str:
    """With one decimal, or with two where two were published."""
    return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"


def markdown(report: Report) -> str:
    """A row for each system, also of those that were only published, a column for each setting of the headline: its shares.

    Published ones are in brackets.
    """
    settings = [at for at in report["headline"] if at in _settings(report)]
    named = {at: [name for name in _names(report, at) if SHARE.fullmatch(name)] for at in settings}
    same = len({tuple(names) for names in named.values()}) == 1
    head = [f"{report['evaluation']}, " + (f"{_spelled(named[settings[0]])} in %" if same else "in %")]
    head += [at.replace("_", " ") + ("" if same else f", {_spelled(named[at])}") for at in settings]
    rows = [head, ["---"] * len(head)]
    for who in [*_systems(report), *_others(report)]:
        name = f"{who} {report['checkpoint']}" if who == "fromage" and who in report else who
        rows.append([name, *(_cell(report, who, at, *named[at]) for at in settings)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


SHARE = re.compile(r"(r|map|hits)(\d+)(_cumulative)?")  # names of figures that a headline shows
SPELLED = {"r": "R@", "map": "mAP@", "hits": "Hits@"}


def _spelled(names: list[str]) -> str:
    """r1, r5, r10 as 'R@1 / 5 / 10'."""
    kinds = [SHARE.fullmatch(name) for name in names]
    parts = [f"{SPELLED[kind[1]]}{kind[2]}{(kind[3] or '').replace('_', ' ')}" for kind in kinds if kind]
    first = parts[0].partition("@")[0] + "@"
    return " / ".join([parts[0], *(part.removeprefix(first) for part in parts[1:])])
