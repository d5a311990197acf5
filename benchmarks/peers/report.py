"""Medians, spreads and ratios of the runs, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import takewhile

from benchmarks.peers.cases import Case, Figures, columns
from benchmarks.peers.ratios import Runs, Spread, spread, succeeded, times_better
from benchmarks.peers.rows import Row
from benchmarks.peers.summary import layout_lines, matrix, verdicts

EXPLAINED = (
    "Medians, in brackets the smallest and the largest run. Times better, or ratio: our figure over theirs, or "
    "theirs over ours where less is better; the median over rounds, in each of which both ran. Where the other has "
    "a prefix cache, our row is the one with a prefix cache. Same tokens: how many greedy tokens of the first "
    "request agree with our row's before the first that does not."
)
EXPLAINED_STARTS = (
    "First: the first start of the series; later: all others, which may find something compiled on disk. Peak: "
    "most resident memory from the start to the end of a process's first workload; in the table above, for later "
    "ones, during the workload. Idle: of one core, after the work of w2."
)


def num_same_tokens(ours: Sequence[Figures], theirs: Sequence[Figures]) -> tuple[int, int] | None:
    """How many tokens of the first request both begin with, and of how many."""
    if not ours or not theirs:
        return None
    a, b = ours[0]["first_request_token_ids"], theirs[0]["first_request_token_ids"]
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))), len(a)


def to_markdown(
    conditions: str, name: str, cases: Sequence[Case], rows: Sequence[Row], runs: Runs, sizes: dict[str, int]
) -> str:
    """What was aimed at and what was reached, a matrix, a table of all cases, one of starts, and what failed.

    Args:
        name: of the picture beside it, without suffix.
        sizes: of installations, in bytes by environment.
    """
    ran = [row for row in rows if any(runs(case.name, row.name) for case in cases)]
    cases = [case for case in cases if any(runs(case.name, row.name) for row in rows)]
    figures = columns(cases)
    parts = [
        [conditions],
        [EXPLAINED],
        verdicts(figures, ran, runs),
        matrix(figures, ran, runs),
        layout_lines(figures, ran, runs),
        [f"![How many times better vattention is than each of the others]({name}.svg)"],
        _table(cases, ran, runs),
        [EXPLAINED_STARTS],
        _starts(cases, ran, runs, sizes),
        _failures(cases, ran, runs),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _table(cases: Sequence[Case], rows: Sequence[Row], runs: Runs) -> list[str]:
    head = ["workload", "figure", "row", "weights / KV", "result", "ratio"]
    head += ["TTFT p50, s", "ITL p50, ms", "peak MiB", "same tokens"]
    lines = [_line(case, row, runs) for case in cases for row in rows if runs(case.name, row.name)]
    return [_cells(head), "|" + "---|" * 4 + "---:|" * 6, *lines]


def _line(case: Case, row: Row, runs: Runs) -> str:
    tried, ours = runs(case.name, row.name), runs(case.name, row.against)
    done = succeeded(tried)
    head = [case.name, case.figure, row.name, f"{row.weights} / {row.kv}"]
    if not done:
        return _cells([*head, "failed", "", "", "", "", ""])
    reference = row.name == row.against
    ratio = None if reference else times_better(case.figure, ours, tried)
    same = num_same_tokens(succeeded(ours), done) if case.greedy and not reference else None
    gaps = [figures["itl_p50_s"] * 1e3 for figures in done if figures["itl_p50_s"] is not None]
    return _cells(
        [
            *head,
            str(spread(case.figure, done)),
            "" if ratio is None else f"{ratio.median:.2f}",
            f"{spread('ttft_p50_s', done).median:,.3g}",
            f"{statistics.median(gaps):,.3g}" if gaps else "",
            f"{spread('peak_rss_bytes', done).largest / 2**20:,.0f}",
            "" if same is None else f"{same[0]} of {same[1]}",
        ]
    )


def _starts(cases: Sequence[Case], rows: Sequence[Row], runs: Runs, sizes: dict[str, int]) -> list[str]:
    head = ["row", "first start to first token, s", "later", "peak MiB", "idle CPU", "installed, MiB", "versions"]
    lines = [_start_line(row, cases, runs, sizes) for row in rows]
    return [_cells(head), "|---|" + "---:|" * 5 + "---|", *lines]


def _start_line(row: Row, cases: Sequence[Case], runs: Runs, sizes: dict[str, int]) -> str:
    done = [figures for case in cases for figures in succeeded(runs(case.name, row.name))]
    started = [figures for figures in done if figures["cold_start_s"] is not None]
    idle = [figures["idle_cpu_share"] for figures in done if "idle_cpu_share" in figures]
    size = sizes.get(row.environment.name)
    return _cells(
        [
            row.name,
            f"{started[0]['cold_start_s']:,.4g}" if started else "",
            _optional(figures["cold_start_s"] for figures in started[1:]),
            f"{max(figures['peak_rss_bytes'] for figures in started) / 2**20:,.0f}" if started else "",
            f"{statistics.median(idle):.1%}" if idle else "",
            "" if size is None else f"{size / 2**20:,.0f}",
            ", ".join(f"{name} {number}" for name, number in done[0]["versions"].items()) if done else "",
        ]
    )


def _failures(cases: Sequence[Case], rows: Sequence[Row], runs: Runs) -> list[str]:
    failures = [
        f"- {case.name}, {row.name}: {_one_line(figures['error'])}"
        for case in cases
        for row in rows
        for figures in runs(case.name, row.name)[-1:]
        if "error" in figures
    ]
    return ["Failed:", "", *failures] if failures else []


def _cells(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _optional(values: Iterable[float]) -> str:
    found = list(values)
    return str(Spread.of(found)) if found else ""


def _one_line(text: str) -> str:
    """The last line of a message, which for Python is the one that says what went wrong."""
    return text.strip().splitlines()[-1][:300]
