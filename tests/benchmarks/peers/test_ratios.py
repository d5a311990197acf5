from __future__ import annotations

import pytest

from benchmarks.peers.cases import Case, columns
from benchmarks.peers.ratios import Spread, bests, layouts, times_better
from benchmarks.peers.rows import ROWS
from tests.benchmarks.peers.figures import figures, rates, runs_of

ROW = {row.name: row for row in ROWS}
(RATE,) = columns([Case("w1", "output_tokens_per_s", [])])
(SHARED,) = columns([Case("w4", "total_tokens_per_s", [])])
FAILED = {"error": "broken"}


def test_ratios_are_taken_in_the_same_round() -> None:
    ours, theirs = rates(30, 40, 90), rates(20, 10, 30)
    assert times_better("output_tokens_per_s", ours, theirs) == Spread(3.0, 1.5, 4.0)
    assert times_better("output_tokens_per_s", ours, [FAILED, *theirs[1:]]) == Spread(3.5, 3.0, 4.0)
    assert times_better("output_tokens_per_s", ours, theirs[:1]) == Spread(1.5, 1.5, 1.5)
    assert times_better("output_tokens_per_s", ours, []) is None
    delay = times_better("ttft_p50_s", [figures(ttft_p50_s=0.5)], [figures(ttft_p50_s=2.0)])
    assert delay == Spread(4.0, 4.0, 4.0)


def test_the_best_of_the_others_is_one_of_the_same_precision() -> None:
    done = {"vattention": rates(30), "vLLM": rates(20), "OpenVINO": rates(25), "llama.cpp, q8_0": rates(60)}
    (best,) = bests(RATE, [ROW[name] for name in done], runs_of(done))
    assert (best.ours.name, best.theirs.name) == ("vattention", "OpenVINO")
    assert best.times.median == pytest.approx(1.2)
    assert not best.met
    done["OpenVINO"] = [FAILED]
    (best,) = bests(RATE, [ROW[name] for name in done], runs_of(done))
    assert (best.theirs.name, best.met) == ("vLLM", True)


def test_prefix_caches_are_compared_among_themselves() -> None:
    names = ("vattention", "vattention, prefix cache", "vLLM", "vLLM, prefix cache")
    done = {name: [figures(total_tokens_per_s=rate)] for name, rate in zip(names, (10, 60, 9, 20), strict=True)}
    found = bests(SHARED, [ROW[name] for name in names], runs_of(done))
    assert [(best.ours.name, best.theirs.name) for best in found] == [(names[0], names[2]), (names[1], names[3])]
    assert found[1].times.median == 3.0


def test_layouts_are_compared_over_all_figures() -> None:
    w2 = columns([Case("w2", "output_tokens_per_s", [])])
    ours = [figures(output_tokens_per_s=40.0, ttft_p50_s=1.0)]
    sliced = [figures(output_tokens_per_s=10.0, ttft_p50_s=1.0)]
    rows = [ROW[name] for name in ("vattention", "vattention, sliced", "vattention, prefix cache")]
    runs = runs_of({"vattention": ours, "vattention, sliced": sliced, "vattention, prefix cache": ours})
    ((row, mean, count),) = layouts(w2, rows, runs)
    assert (row.name, count) == ("vattention, sliced", 2)
    assert mean == pytest.approx(2.0)
