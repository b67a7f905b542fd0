"""What an evaluation reports: a dictionary for a JSON file, a table for the terminal, a row for a Markdown table."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from itertools import groupby
from typing import Any

from fromage.models.base import VisualPrefixLM
from fromage.retrieval.encode import NAMED, Encoded

Figures = dict[str, float]
System = dict[str, Figures]  # setting -> figures
SYSTEMS = ("fromage", "octopus", "sequential", "clip", "chance")
PACKAGES = ("fromage", "torch", "torchvision", "transformers", "open_clip_torch", "torchmetrics")


def make_report(
    name: str,
    model: VisualPrefixLM,
    systems: dict[str, System],
    protocol: dict[str, str],
    data: str,
    sizes: dict[str, int],
    encoded: Encoded,
    skipped: dict[str, int],
    paper: dict[str, System],
    headline: Sequence[str],
) -> dict[str, Any]:
    """Everything about a run of the evaluation `name`.

    Args:
        systems: figures of each of SYSTEMS there is, by setting; shares in percent.
        protocol: what the figures mean, by topic.
        data: where they are from.
        sizes: of the gallery, and how many queries there were.
        skipped: what was left out beside the images lost, by cause.
        paper: the published figures, of the same shape as systems; only what is among the systems is kept.
        headline: settings that a row of a Markdown table has.
    """
    beside = {who: {at: f for at, f in paper.get(who, {}).items() if at in systems[who]} for who in systems}
    return {
        "evaluation": name,
        **{who: {at: _rounded(figures) for at, figures in settings.items()} for who, settings in systems.items()},
        "paper": {who: settings for who, settings in beside.items() if settings},
        "protocol": protocol,
        "data": data,
        "headline": list(headline),
        **sizes,
        "skipped": encoded.counts() | skipped,
        "lost": [f"{path} ({cause})" for cause, path in encoded.lost[:NAMED]],
        "checkpoint": model.fingerprint(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }


def _rounded(figures: Figures) -> Figures:
    return {name: round(value, 4) for name, value in figures.items()}


def table(report: dict[str, Any]) -> str:
    """The figures as lines for the terminal, the published ones in brackets; settings with equal figures under one head."""
    skipped = ", ".join(f"{count} {what}" for what, count in report["skipped"].items() if count) or "nothing"
    lines = [f"{report['evaluation']}: {report['data']}", f"{_sizes(report)}; skipped: {skipped}"]
    settings = list(dict.fromkeys(at for who in _systems(report) for at in report[who]))
    for names, some in groupby(settings, key=lambda at: _columns(report, at)):
        rows = [(at, who) for at in some for who in _systems(report) if at in report[who]]
        cells = [[at, who, *(_cell(report, who, at, name) for name in names)] for at, who in rows]
        lines += ["", *_aligned([["", "", *names], *cells])]
    return "\n".join([*lines, "", *(f"{topic}: {text}" for topic, text in report["protocol"].items())])


def _systems(report: dict[str, Any]) -> list[str]:
    return [who for who in SYSTEMS if who in report]


def _columns(report: dict[str, Any], setting: str) -> tuple[str, ...]:
    return next(tuple(report[who][setting]) for who in _systems(report) if setting in report[who])


def _sizes(report: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in report.items() if isinstance(value, int))


def _cell(report: dict[str, Any], who: str, setting: str, name: str) -> str:
    if name not in report[who][setting]:
        return ""
    published = report["paper"].get(who, {}).get(setting, {}).get(name)
    return f"{report[who][setting][name]:.1f}" + (f" ({published:.1f})" if published is not None else "")


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        left, right = zip(row[:2], widths, strict=False), zip(row[2:], widths[2:], strict=True)
        lines.append("  ".join([*(cell.ljust(w) for cell, w in left), *(cell.rjust(w) for cell, w in right)]).rstrip())
    return lines


def markdown(report: dict[str, Any]) -> str:
    """A heading and a row for each system, a column for each setting: its figures with slashes between, then the paper's."""
    settings = [at for at in report["headline"] if at in report["fromage"]]
    head = [f"{report['evaluation']}, R@1 / 5 / 10 in %", *(at.replace("_", " ") for at in settings)]
    rows = [head, ["---"] * len(head)]
    for who in _systems(report):
        name = f"{who} {report['checkpoint']}" if who == "fromage" else who
        rows.append([name, *(_recalls(report, who, at) for at in settings)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _recalls(report: dict[str, Any], who: str, setting: str) -> str:
    def joined(figures: Figures) -> str:
        return " / ".join(f"{figures[name]:.1f}" for name in ("r1", "r5", "r10") if name in figures)

    published = joined(report["paper"].get(who, {}).get(setting, {}))
    return joined(report[who].get(setting, {})) + (f" ({published})" if published else "")
