from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.peers.engines.driver import Load, Sample, do, measure, process_age_s
from tests.benchmarks.peers.engines.requests import request
from vattention.bench.workload import BenchRequest


class Counting:
    """An engine whose tokens are 0, 1, 2 and come a second apart, on a clock of its own."""

    packages = ("numpy",)

    def __init__(self, short_by: int = 0) -> None:
        self.settings: dict[str, Any] = {"knob": 1}
        self.seen: list[list[BenchRequest]] = []
        self.prepared: list[Load] = []
        self._short_by = short_by

    def prepare(self, load: Load) -> None:
        self.prepared.append(load)

    def complete(self, requests: Sequence[BenchRequest]) -> list[list[Sample]]:
        self.seen.append(list(requests))
        return [[self._sample(one) for _ in range(one.params.n)] for one in requests]

    def close(self) -> None: ...

    def _sample(self, one: BenchRequest) -> Sample:
        count = (one.params.max_tokens or 1) - self._short_by
        return Sample(list(range(count)), [100.0 + index for index in range(count)])


def test_figures_count_prompts_once_and_every_sample() -> None:
    figures = measure(Counting(), [request(5, 4, n=3), request(9, 2)])
    assert (figures["num_requests"], figures["num_prompt_tokens"], figures["num_output_tokens"]) == (2, 14, 14)
    assert figures["output_tokens_per_s"] == pytest.approx(14 / figures["elapsed_s"])
    assert figures["itl_p50_s"] == figures["itl_p99_s"] == 1.0
    assert figures["first_request_token_ids"] == [0, 1, 2, 3]
    assert figures["settings"] == {"knob": 1}


def test_too_few_tokens_are_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"request 0 got \[3\] tokens, not 1 times 4"):
        measure(Counting(short_by=1), [request(5, 4)])


def test_tokens_that_come_together_share_the_time() -> None:
    sample = Sample()
    sample.extend([1], 10.0)
    sample.extend([2, 3], 12.0)
    assert (sample.token_ids, sample.times) == ([1, 2, 3], [10.0, 11.0, 12.0])


def test_load_says_what_engines_must_know_beforehand() -> None:
    assert Load.of([request(5, 4, n=3), request(9, 2)]) == Load(longest=11, num_sequences=4, uniform=False)
    assert Load.of([request(5, 4)] * 2).uniform


def test_a_process_begins_cold_and_each_workload_with_a_warm_up() -> None:
    engine = Counting()
    work = [request(300, 50)] * 10
    first = do(engine, work, 0.0, first=True)
    shapes = [[(len(one.prompt_token_ids), one.params.max_tokens) for one in seen] for seen in engine.seen]
    assert shapes == [[(16, 1)], [(128, 4)] * 4, [(300, 50)] * 10]
    assert 0 < first["cold_start_s"] <= process_age_s()
    assert "idle_cpu_share" not in first
    second = do(engine, work, 0.05, first=False)
    assert [len(seen) for seen in engine.seen[3:]] == [4, 10]
    assert second["cold_start_s"] is None
    assert 0 <= second["idle_cpu_share"] < 20
    assert engine.prepared == [Load(350, 10, uniform=True)] * 2


def test_a_later_workload_has_a_peak_of_its_own() -> None:
    do(Counting(), [request(5, 4)], 0.0, first=True)
    page = bytearray(64 * 2**20)
    before = do(Counting(), [request(5, 4)], 0.0, first=False)["peak_rss_bytes"]
    del page
    assert do(Counting(), [request(5, 4)], 0.0, first=False)["peak_rss_bytes"] < before - 32 * 2**20
