"""How many times better vattention is than each of the others, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.peers.cases import Case, columns
from benchmarks.peers.ratios import Runs, between
from benchmarks.peers.rows import Row

mpl.use("svg")

COLOURS = ("#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00")
"""Of engines: Okabe and Ito's, which people who see colours differently tell apart. Rows have their own marks."""
MARKS = "osD^vP*X<>hd"
OURS, AIM = "black", "#888888"
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
HEIGHT_OF_COLUMN, SPREAD_OF_ROWS = 0.62, 0.36


def draw(cases: Sequence[Case], rows: Sequence[Row], runs: Runs, model: str, path: Path) -> None:
    """Write an SVG: a line of marks for each figure, and a mark for each row, with its worst and its best round.

    Rows with a prefix cache are in the line below their figure's own.
    """
    from matplotlib import pyplot, ticker

    mpl.rcParams["svg.hashsalt"] = "vattention"  # the same file for the same figures
    mpl.rcParams["svg.fonttype"] = "none"  # small files
    compared = [row for row in rows if row.name != row.against and not row.ours]
    lines = _lines(cases, compared, runs)
    figure, axes = pyplot.subplots(figsize=(9, HEIGHT_OF_COLUMN * len(lines) + 1.6), layout="constrained")
    axes.axvline(1, color=OURS, linewidth=2, label="vattention, in the same precision", zorder=1)
    for place, (_, aim, _) in enumerate(lines):
        label = "aim" if place == 0 else None
        axes.plot([aim] * 2, [place - 0.4, place + 0.4], color=AIM, linestyle=":", label=label, zorder=1)
    peers = list(dict.fromkeys(row.peer for row in compared))
    shown = [row for row in compared if any(row.name in found for _, _, found in lines)]
    for index, row in enumerate(shown):
        offset = (index / max(1, len(shown) - 1) - 0.5) * 2 * SPREAD_OF_ROWS
        points = [
            (found[row.name], place + offset) for place, (_, _, found) in enumerate(lines) if row.name in found
        ]
        middles = [times.median for times, _ in points]
        axes.errorbar(
            middles,
            [place for _, place in points],
            xerr=[
                [max(0.0, times.median - times.smallest) for times, _ in points],
                [max(0.0, times.largest - times.median) for times, _ in points],
            ],
            fmt=MARKS[index % len(MARKS)],
            color=COLOURS[peers.index(row.peer) % len(COLOURS)],
            markersize=6,
            linewidth=1,
            label=f"{row.name} ({row.weights})" if row.weights not in row.name else row.name,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks(range(len(lines)), [title for title, _, _ in lines], fontsize=8)
    axes.set_ylim(max(1, len(lines)) - 0.5, -0.5)
    axes.set_xlabel("how many times better vattention is; left of the line the other one is better", fontsize=9)
    axes.set_title(f"vattention beside other engines, {model}", fontsize=11)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _lines(cases: Sequence[Case], rows: Sequence[Row], runs: Runs) -> list[tuple[str, float, dict[str, Any]]]:
    """Title, aim and ratios by row."""
    lines = []
    for column in columns(cases):
        for cached in (False, True):
            found = {
                row.name: times
                for row in rows
                if row.prefix_cached == cached
                and (times := between(column, row.against, row.name, runs)) is not None
            }
            if found:
                title = f"{column.title}{', prefix cached' if cached else ''}"
                lines.append((title, column.aim.times, found))
    return lines
