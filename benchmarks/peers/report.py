"""Medians, spreads and ratios of the runs, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from benchmarks.peers.cases import Case, Figures
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


def times_better(case: Case, ours: Sequence[Figures], theirs: Sequence[Figures]) -> float | None:
    """How many times better our median is than theirs; None where a side has no run."""
    if not ours or not theirs:
        return None
    ratio = _spread(case.figure, ours).median / _spread(case.figure, theirs).median
    return ratio if case.higher_is_better else 1 / ratio


def num_same_tokens(ours: Sequence[Figures], theirs: Sequence[Figures]) -> tuple[int, int] | None:
    """How many tokens of the first request both begin with, and of how many."""
    if not ours or not theirs:
        return None
    a, b = ours[0]["first_request_token_ids"], theirs[0]["first_request_token_ids"]
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))), len(a)


def to_markdown(
    conditions: str, cases: Sequence[Case], rows: Sequence[Row], runs: Runs, sizes: dict[str, int]
) -> str:
    """A table of all cases that ran, then one of starts, memory and sizes, then what failed and why."""
    lines = [
        conditions,
        "",
        "Medians, in brackets the smallest and the largest run. Ratio: how many times better vattention is, beside "
        "its row with a prefix cache where the other has one. Same tokens: how many greedy tokens of the first "
        "request agree with that row's before the first that does not.",
        "",
        "| workload | figure | row | weights / KV | result | ratio | TTFT p50, s | ITL p50, ms | peak MiB "
        "| same tokens |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_line(case, row, runs) for case in cases for row in rows if runs(case.name, row.name)]
    lines += ["", "| row | start to first token, s | installed, MiB | versions |", "|---|---:|---:|---|"]
    lines += [
        _start_line(row, [c for c in cases if row.takes(c.workload)], runs, sizes)
        for row in rows
        if _ran(row, cases, runs)
    ]
    failures = [
        f"- {case.name}, {row.name}: {_one_line(figures['error'])}"
        for case in cases
        for row in rows
        for figures in runs(case.name, row.name)[-1:]
        if "error" in figures
    ]
    return "\n".join([*lines, *(["", "Failed:", "", *failures] if failures else [])]) + "\n"


def _ran(row: Row, cases: Sequence[Case], runs: Runs) -> bool:
    return any(runs(case.name, row.name) for case in cases)


def _line(case: Case, row: Row, runs: Runs) -> str:
    done, ours = succeeded(runs(case.name, row.name)), succeeded(runs(case.name, row.against))
    head = f"| {case.name} | {case.figure} | {row.name} | {row.weights} / {row.kv} |"
    if not done:
        return f"{head} failed | | | | | |"
    ratio = None if row.name == row.against else times_better(case, ours, done)
    same = num_same_tokens(ours, done) if case.greedy and row.name != row.against else None
    gaps = [figures["itl_p50_s"] * 1e3 for figures in done if figures["itl_p50_s"] is not None]
    return (
        f"{head} {_spread(case.figure, done)} | {'' if ratio is None else f'{ratio:.2f}'} "
        f"| {_spread('ttft_p50_s', done).median:,.3g} | {f'{statistics.median(gaps):,.3g}' if gaps else ''} "
        f"| {_spread('peak_rss_bytes', done).largest / 2**20:,.0f} "
        f"| {'' if same is None else f'{same[0]} of {same[1]}'} |"
    )


def _start_line(row: Row, cases: Sequence[Case], runs: Runs, sizes: dict[str, int]) -> str:
    done = [figures for case in cases for figures in succeeded(runs(case.name, row.name))]
    starts = str(_spread("cold_start_s", done)) if done else ""
    versions = ", ".join(f"{name} {number}" for name, number in done[0]["versions"].items()) if done else ""
    size = sizes.get(row.environment.name)
    return f"| {row.name} | {starts} | {'' if size is None else f'{size / 2**20:,.0f}'} | {versions} |"


def _spread(figure: str, runs: Sequence[Figures]) -> Spread:
    return Spread.of(figures[figure] for figures in runs)


def _one_line(text: str) -> str:
    """The last line of a message, which for Python is the one that says what went wrong."""
    return text.strip().splitlines()[-1][:300]
