from __future__ import annotations

import pytest

from benchmarks.peers.cases import cases, columns, higher_is_better, longest


def test_all_workloads_are_cases_and_only_takes_some() -> None:
    names = [case.name for case in cases((), 1.0)]
    assert names[:5] == ["w1", "w2", "w3", "w4", "w5"]
    assert names[5:] == [f"w6 {batch}x{context}" for batch in (1, 4, 16, 64) for context in (256, 1024)]
    assert [case.name for case in cases(("w2", "w3"), 1.0)] == ["w2", "w3"]
    assert [case.name for case in cases(("w2", "w6 16x1024"), 1.0)] == ["w2", "w6 16x1024"]
    with pytest.raises(ValueError, match="w9: there are w1, w2"):
        cases(("w9",), 1.0)


def test_scale_takes_fewer_requests_and_not_shorter_ones() -> None:
    by_name = {case.name: case for case in cases((), 0.25)}
    assert len(by_name["w1"].requests) == 16
    assert len(by_name["w4"].requests) == 8
    assert len(by_name["w4"].requests[0]["prompt_token_ids"]) == 1056
    assert len(by_name["w6 64x256"].requests) == 64


def test_decoding_is_judged_by_the_time_between_tokens() -> None:
    (case,) = [case for case in cases((), 1.0) if case.name == "w6 16x1024"]
    assert case.figure == "itl_p50_s"
    assert not higher_is_better(case.figure)


def test_a_single_stream_has_two_columns() -> None:
    titles = [column.title for column in columns(cases((), 0.25))]
    assert titles[:3] == ["w1 tokens/s", "w2 tokens/s", "w2 TTFT, s"]
    assert titles[-1] == "w6 64x1024 ITL, s"
    assert len(titles) == 6 + 8


def test_the_longest_is_counted_with_its_output() -> None:
    assert max(map(longest, cases((), 0.25))) == 4096 + 16
