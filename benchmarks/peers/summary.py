"""What the comparison says, at a glance."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.peers.cases import Column
from benchmarks.peers.ratios import Best, Runs, bests, between, layouts, spread, succeeded
from benchmarks.peers.rows import Row


def verdicts(columns: Sequence[Column], rows: Sequence[Row], runs: Runs) -> list[str]:
    """A table with the best of the others in each column, at each precision."""
    found = [best for column in columns for best in bests(column, rows, runs)]
    head = ["| figure | weights | vattention | best of the others | | times better | aim | |"]
    head += ["|---|---|---:|---|---:|---:|---:|---|"]
    return [*head, *(_verdict(best, runs) for best in sorted(found, key=lambda best: -best.ours.bits))]


def _verdict(best: Best, runs: Runs) -> str:
    name, figure = best.column.case.name, best.column.aim.figure
    values = [f"{spread(figure, succeeded(runs(name, row.name))).median:,.4g}" for row in (best.ours, best.theirs)]
    title = f"{best.column.title}{', prefix cached' if best.ours.prefix_cached else ''}"
    times = f"{best.times.median:.2f} ({best.times.smallest:.2f} to {best.times.largest:.2f})"
    return (
        f"| {title} | {best.ours.weights} | {values[0]} | {best.theirs.name} | {values[1]} | {times} "
        f"| {best.column.aim.times:g} | {'met' if best.met else '**not met**'} |"
    )


def matrix(columns: Sequence[Column], rows: Sequence[Row], runs: Runs) -> list[str]:
    """A row for each that ran, a column for each figure; in brackets how many times better vattention is."""
    lines = [["row", "weights / KV", *(column.title for column in columns)]]
    lines += [
        [row.name, f"{row.weights} / {row.kv}", *(_cell(column, row, runs) for column in columns)]
        for row in rows
        if any(runs(column.case.name, row.name) for column in columns)
    ]
    head, *body = [f"| {' | '.join(cells)} |" for cells in lines]
    return [head, "|" + "---|" * 2 + "---:|" * len(columns), *body]


def _cell(column: Column, row: Row, runs: Runs) -> str:
    tried = runs(column.case.name, row.name)
    done = succeeded(tried)
    if not done:
        return "failed" if tried else ""
    value = f"{spread(column.aim.figure, done).median:,.4g}"
    times = None if row.name == row.against else between(column, row.against, row.name, runs)
    return value if times is None else f"{value} ({times.median:.2f})"


def layout_lines(columns: Sequence[Column], rows: Sequence[Row], runs: Runs) -> list[str]:
    """Which of our layouts is faster over all."""
    return [
        f"Over {count} figures of this table the default layout is {mean:.3f} times as good as {row.name} "
        "(geometric mean)."
        for row, mean, count in layouts(columns, rows, runs)
    ]
