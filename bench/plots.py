"""Small SVG line plots, written by hand: matplotlib is not among our dependencies, and any browser shows these."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

PLOT_WIDTH, HEIGHT = 420, 360
LEFT, TOP, BOTTOM = 70, 40, 45
LETTER = 7.5
"""Of a name at the right, at most."""
COLOURS = (
    "#1b6ca8", "#d1495b", "#3a7d44", "#8d5fd3", "#c17817", "#444444", "#17a2b8", "#a0522d", "#e377c2", "#7f9c1f",
    "#00539c", "#b0b0b0",
)  # fmt: skip

MOST_MARKS = 12
"""On the x axis: of more points only round numbers are marked."""

Lines = Mapping[str, Sequence[tuple[float, float]]]
"""For each name its points (x, y)."""


def line_plot(path: Path, title: str, x_name: str, y_name: str, lines: Lines) -> None:
    """Write the lines as an SVG; the y axis begins at 0. Nothing is written where there are no points."""
    right = LEFT + PLOT_WIDTH
    width = right + 30 + LETTER * max((len(name) for name in lines), default=0)
    points = [point for line in lines.values() for point in line]
    if not points:
        return
    x_least, x_most = min(x for x, _ in points), max(x for x, _ in points)
    step = _step(max(y for _, y in points))
    y_most = step * math.ceil(max(max(y for _, y in points), step) / step)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (x - x_least) / (x_most - x_least) if x_most > x_least else 0.5
        return LEFT + share * PLOT_WIDTH, HEIGHT - BOTTOM - y / y_most * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(LEFT, 20, title, "start", 14),
        _text((LEFT + right) / 2, HEIGHT - 8, x_name, "middle"),
        _text(LEFT - 8, TOP - 8, y_name, "end"),
    ]
    for number in range(round(y_most / step) + 1):
        _, y = place(x_least, number * step)
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{number * step:g}", "end"))
    marked = sorted({x for x, _ in points})
    if len(marked) > MOST_MARKS:
        x_step = _step(x_most - x_least)
        marked = [x_step * n for n in range(math.ceil(x_least / x_step), math.floor(x_most / x_step) + 1)]
    for x in marked:
        parts.append(_text(place(x, 0)[0], HEIGHT - BOTTOM + 16, f"{x:g}", "middle"))
    for index, (name, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        placed = [place(x, y) for x, y in sorted(line)]
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" '
            f'points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}"/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
        parts.append(f'<rect x="{right + 10}" y="{TOP + 18 * index}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(right + 25, TOP + 18 * index + 9, name, "start"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def _step(most: float) -> float:
    """Between lines of the grid: 1, 2 or 5 times a power of ten, so that there are 3 to 8 of them."""
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most / 4))
    return power * next(factor for factor in (1, 2, 5, 10) if most / (power * factor) <= 8)


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
