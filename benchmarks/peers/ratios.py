"""How many times better one row is than another."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.peers.cases import Column, Figures, higher_is_better
from benchmarks.peers.rows import Row

Runs = Callable[[str, str], list[Figures]]
"""The runs of a case and a row, by their names."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Over the runs of a row."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def __str__(self) -> str:
        return f"{self.median:,.4g} ({self.smallest:,.4g} to {self.largest:,.4g})"


def succeeded(runs: Sequence[Figures]) -> list[Figures]:
    return [figures for figures in runs if "error" not in figures]


def spread(figure: str, runs: Iterable[Figures]) -> Spread:
    return Spread.of(figures[figure] for figures in runs)


def times_better(figure: str, ours: Sequence[Figures], theirs: Sequence[Figures]) -> Spread | None:
    """How many times better our runs are than theirs of the same round; None where no round has both.

    A machine that others share is faster at one hour than at another, which both sides of a round have seen.
    """
    pairs = [
        (a[figure], b[figure]) for a, b in zip(ours, theirs, strict=False) if "error" not in a and "error" not in b
    ]
    if not pairs:
        return None
    return Spread.of(a / b if higher_is_better(figure) else b / a for a, b in pairs)


@dataclass(frozen=True, slots=True)
class Best:
    """Our figure and the best of the others' at the same precision."""

    column: Column
    ours: Row
    theirs: Row
    times: Spread

    @property
    def met(self) -> bool:
        return self.times.median >= self.column.aim.times


def ours_of(rows: Sequence[Row], bits: int, *, prefix_cached: bool = False) -> Row | None:
    """Our row of a precision: the first, which has the default layout."""
    of_kind = (row for row in rows if row.ours and (row.bits, row.prefix_cached) == (bits, prefix_cached))
    return next(of_kind, None)


def bests(column: Column, rows: Sequence[Row], runs: Runs) -> list[Best]:
    """One for each precision that we and others ran, and one more where prefixes are kept."""
    found = []
    for kind in dict.fromkeys((row.bits, row.prefix_cached) for row in rows):
        ours = ours_of(rows, kind[0], prefix_cached=kind[1])
        if ours is None:
            continue
        others = [row for row in rows if not row.ours and (row.bits, row.prefix_cached) == kind]
        compared = [
            Best(column, ours, row, times)
            for row in others
            if (times := between(column, ours.name, row.name, runs)) is not None
        ]
        if compared:
            found.append(min(compared, key=lambda best: best.times.median))
    return found


def between(column: Column, ours: str, theirs: str, runs: Runs) -> Spread | None:
    """`times_better` in a column, for rows by name."""
    name = column.case.name
    return times_better(column.aim.figure, runs(name, ours), runs(name, theirs))


def layouts(cases_columns: Sequence[Column], rows: Sequence[Row], runs: Runs) -> list[tuple[Row, float, int]]:
    """Our rows that differ from the default in their layout only: how many times better the default is.

    The geometric mean over all columns that both have, and how many these are.
    """
    found = []
    for row in rows:
        default = ours_of(rows, row.bits)
        if not row.ours or row.prefix_cached or default is None or row is default:
            continue
        ratios = [
            times.median
            for column in cases_columns
            if (times := between(column, default.name, row.name, runs)) is not None
        ]
        if ratios:
            found.append((row, statistics.geometric_mean(ratios), len(ratios)))
    return found
