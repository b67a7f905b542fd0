"""Line charts as SVG, for notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, isfinite, log10

WIDTH, HEIGHT = 640, 320  # pixels of the page
LEFT, RIGHT, TOP, BOTTOM = 64, 470, 40, 272  # where the axes run; the names of the lines stand right of them
INK, GREY, RULE = "#1c1e22", "#70747c", "#dedfe4"
COLOURS = ("#1f6feb", "#d1490c", "#1a7f37", "#8250df", "#9a6700", "#57606a")
Points = Sequence[tuple[float, float]]


def line_chart(lines: Mapping[str, Points], title: str = "", x: str = "", y: str = "") -> str:
    """An SVG of the lines over a grid; the y axis holds 0.

    lines: (x, y) pairs by name. title, x, y: what stands above the chart and along its axes. What is not finite is left out.
    """
    lines = {name: [point for point in points if all(map(isfinite, point))] for name, points in lines.items()}
    across = ticks([px for points in lines.values() for px, _ in points])
    upwards = ticks([0.0, *(py for points in lines.values() for _, py in points)])

    def place(px: float, py: float) -> tuple[float, float]:
        return (
            LEFT + (RIGHT - LEFT) * (px - across[0]) / (across[-1] - across[0]),
            BOTTOM - (BOTTOM - TOP) * (py - upwards[0]) / (upwards[-1] - upwards[0]),
        )

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', _text(LEFT, TOP - 18, title, INK, "start")]
    for tick in across:
        left, _ = place(tick, upwards[0])
        parts.append(_text(left, BOTTOM + 18, f"{tick:g}", GREY))
    for tick in upwards:
        _, top = place(across[0], tick)
        parts.append(f'<path d="M{LEFT} {top:.1f}H{RIGHT}" stroke="{RULE}"/>')
        parts.append(_text(LEFT - 8, top + 4, f"{tick:g}", GREY, "end"))
    parts += [_text((LEFT + RIGHT) / 2, HEIGHT - 10, x, GREY), _text(LEFT, TOP - 2, y, GREY, "start")]
    for n, (name, points) in enumerate(lines.items()):
        parts += _line([place(*point) for point in points], name, n)
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">', *parts, "</svg>"]
    )


def ticks(values: Sequence[float]) -> list[float]:
    """Three to nine round numbers at equal distances, from the least value or below it to the greatest or above."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = (high - low) or abs(high) or 1.0
    step = 10 ** floor(log10(span))
    step = next(step * part for part in (0.2, 0.5, 1, 2) if span / (step * part) <= 6)
    return [step * n for n in range(floor(low / step), max(ceil(high / step), floor(low / step) + 1) + 1)]


def _line(points: Points, name: str, number: int) -> list[str]:
    """The nth line with a dot at each of few points, and its name in the legend."""
    colour, top = COLOURS[number % len(COLOURS)], TOP + 20 * number
    path = " ".join(f"{left:.1f},{up:.1f}" for left, up in points)
    dots = [f'<circle cx="{left:.1f}" cy="{up:.1f}" r="3" fill="{colour}"/>' for left, up in points if len(points) <= 20]
    legend = f'<path d="M{RIGHT + 16} {top}h16" stroke="{colour}" stroke-width="2"/>'
    line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    return [line, *dots, legend, _text(RIGHT + 38, top + 4, name, INK, "start")]


def _text(left: float, top: float, text: str, colour: str, anchor: str = "middle") -> str:
    return f'<text x="{left:.1f}" y="{top:.1f}" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>'
