"""Line charts as SVG, for reports and notebooks."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

Points = Sequence[tuple[float, float]]
SIZE = (6.4, 3.2)  # inches
FEW = 20  # points, each of which gets a dot
# Texts stay texts, and equal charts are equal files.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "fromage", "font.size": 9, "text.parse_math": False}


def line_chart(lines: Mapping[str, Points], title: str = "", x: str = "", y: str = "") -> str:
    """An SVG of the lines over a grid; the y axis holds 0. The nth line is the group of id line-n.

    lines: (x, y) pairs by name. title, x, y: what stands above the chart and along its axes. What is not finite is left out.
    """
    from matplotlib import rc_context  # which takes half a second to import
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(axis="y", alpha=0.5)
        for n, (name, points) in enumerate(lines.items()):
            finite = [point for point in points if all(map(isfinite, point))]
            xs, ys = [px for px, _ in finite], [py for _, py in finite]
            axes.plot(xs, ys, marker="o" if len(finite) <= FEW else "", markersize=4, label=name, gid=f"line-{n}")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.0), max(high, 0.0))
        if lines:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
