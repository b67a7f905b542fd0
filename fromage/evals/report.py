"""Reports printed: a table for the terminal, rows for a Markdown table. What a report holds is said in base.Run.report."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from tabulate import tabulate

Figures = dict[str, float]  # by name, such as r1; shares in percent
System = dict[str, Figures]  # of one system, by setting
Report = dict[str, Any]

SYSTEMS = ("fromage", "octopus", "sequential", "clip", "chance")


def table(report: Report) -> str:
    """A table for each kind of figures, published ones in brackets, between what was evaluated and the protocol."""
    sizes = ", ".join(f"{name} {value}" for name, value in report.items() if isinstance(value, int))
    skipped = ", ".join(f"{count} {what}" for what, count in report["skipped"].items() if count) or "nothing"
    blocks = [f"{report['evaluation']}: {report['data']}\n{sizes}; skipped: {skipped}"]
    rows = [(at, who) for at in _settings(report) for who in _systems(report) if at in report[who]]
    for names, some in groupby(rows, key=lambda row: _names(report, row[0])):
        cells = [[at, who, *(_cell(report, who, at, name) for name in names)] for at, who in some]
        align = ("left", "left", *["right"] * len(names))
        blocks.append(tabulate([["", "", *names], *cells], tablefmt="plain", colalign=align, disable_numparse=True))
    return "\n\n".join([*blocks, "\n".join(f"{topic}: {text}" for topic, text in report["protocol"].items())])


def _systems(report: Report) -> list[str]:
    return [who for who in SYSTEMS if who in report]


def _settings(report: Report) -> list[str]:
    return list(dict.fromkeys(at for who in _systems(report) for at in report[who]))


def _names(report: Report, setting: str) -> list[str]:
    """The figures of a setting, as the first system that has it gives them."""
    return next(list(report[who][setting]) for who in _systems(report) if setting in report[who])


def _cell(report: Report, who: str, setting: str, *names: str) -> str:
    """Figures of a system, those of `names` that it has, and in brackets the published ones."""
    ours, published = report[who].get(setting, {}), report["paper"].get(who, {}).get(setting, {})
    texts = [" / ".join(f"{some[name]:.1f}" for name in names if name in some) for some in (ours, published)]
    return texts[0] + (f" ({texts[1]})" if texts[1] else "")


def markdown(report: Report) -> str:
    """A row for each system, a column for each setting of the headline: R@1 / 5 / 10, in brackets the published ones."""
    settings = [at for at in report["headline"] if at in report["fromage"]]
    head = [f"{report['evaluation']}, R@1 / 5 / 10 in %", *(at.replace("_", " ") for at in settings)]
    rows = [head, ["---"] * len(head)]
    for who in _systems(report):
        name = f"{who} {report['checkpoint']}" if who == "fromage" else who
        rows.append([name, *(_cell(report, who, at, "r1", "r5", "r10") for at in settings)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
