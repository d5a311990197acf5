from __future__ import annotations

from typing import Any

import pytest

from benchmarks import against_transformers
from benchmarks.against_transformers import Case, cases, compare, run_case, to_markdown


def figures(**values: float) -> dict[str, Any]:
    return {"peak_rss_bytes": 2**20, **values}


def test_all_workloads_are_cases_and_only_takes_some() -> None:
    names = [case.name for case in cases((), 1.0)]
    assert names[:5] == ["w1", "w2", "w3", "w4", "w5"]
    assert names[5:] == [f"w6 {batch}x{context}" for batch in (1, 4, 16, 64) for context in (256, 1024)]
    assert [case.name for case in cases(("w2", "w3"), 1.0)] == ["w2", "w3"]


def test_scale_takes_fewer_requests_and_not_shorter_ones() -> None:
    by_name = {case.name: case for case in cases((), 0.25)}
    assert len(by_name["w1"].requests) == 16
    assert len(by_name["w4"].requests) == 8
    assert len(by_name["w4"].requests[0]["prompt_token_ids"]) == 1056
    assert [name for name in by_name if name.startswith("w6")] == [
        f"w6 {batch}x{context}" for batch in (1, 4, 16) for context in (256, 1024)
    ]


def test_factors_say_how_many_times_better_ours_is() -> None:
    rate = Case("w1", "output_tokens_per_s", [])
    row = compare(
        rate, [figures(output_tokens_per_s=v) for v in (30.0, 40.0, 90.0)], [figures(output_tokens_per_s=20)]
    )
    assert row["factor"] == 2.0
    assert row["vattention"] == {"median": 40.0, "min": 30.0, "max": 90.0, "peak_rss_bytes": 2**20}
    delay = Case("w3", "ttft_p50_s", [])
    assert compare(delay, [figures(ttft_p50_s=0.5)], [figures(ttft_p50_s=2.0)])["factor"] == 4.0
    table = to_markdown("a machine", [row])
    assert "| w1 | output_tokens_per_s | 40 (30 to 90) | 20 (20 to 20) | 2.00 | 1 / 1 |" in table


def test_a_decode_rate_leaves_the_prompt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {
        32: figures(elapsed_s=5.0, num_output_tokens=128),
        1: figures(elapsed_s=3.0, num_output_tokens=4),
    }
    monkeypatch.setattr(
        against_transformers, "run_side", lambda _command, requests: dict(runs[requests[0]["max_tokens"]])
    )
    case = next(case for case in cases(("w6",), 1.0) if case.name == "w6 4x256")
    assert run_case(case, [])["decode_tokens_per_s"] == (128 - 4) / 2.0


def test_a_side_that_fails_ends_the_comparison_with_its_message() -> None:
    with pytest.raises(SystemExit, match="No module named"):
        against_transformers.run_side(["no_such_module"], [])
