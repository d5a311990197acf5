from __future__ import annotations

from typing import Any

import pytest

from benchmarks.peers.cases import Case
from benchmarks.peers.report import num_same_tokens, times_better, to_markdown
from benchmarks.peers.rows import ROWS, chosen

RATE = Case("w1", "output_tokens_per_s", [{"temperature": 0.0}])
ROW = {row.name: row for row in ROWS}


def figures(tokens: tuple[int, ...] = (1, 2), **values: float) -> dict[str, Any]:
    return {
        "peak_rss_bytes": 2**20,
        "ttft_p50_s": 1.0,
        "itl_p50_s": 0.5,
        "cold_start_s": 3.0,
        "first_request_token_ids": list(tokens),
        "versions": {"engine": "1.2"},
        **values,
    }


def test_ratios_say_how_many_times_better_ours_is() -> None:
    ours = [figures(output_tokens_per_s=v) for v in (30.0, 40.0, 90.0)]
    assert times_better(RATE, ours, [figures(output_tokens_per_s=20)]) == 2.0
    delay = Case("w3", "ttft_p50_s", [])
    assert times_better(delay, [figures(ttft_p50_s=0.5)], [figures(ttft_p50_s=2.0)]) == 4.0
    assert times_better(RATE, ours, []) is None


def test_same_tokens_are_counted_up_to_the_first_that_differs() -> None:
    assert num_same_tokens([figures((1, 2, 3, 4))], [figures((1, 2, 9, 4))]) == (2, 4)


def test_the_table_has_every_row_and_says_why_one_failed() -> None:
    done = {
        "vattention": [figures(output_tokens_per_s=v) for v in (30.0, 40.0, 90.0)],
        "vLLM": [figures((1, 3), output_tokens_per_s=20.0)],
        "OpenVINO": [{"error": "Traceback\n  lines\nRuntimeError: no such model"}],
    }
    rows = [ROW[name] for name in ("vattention", "vLLM", "OpenVINO", "vLLM, prefix cache")]
    table = to_markdown("a machine", [RATE], rows, lambda _case, row: done.get(row, []), {"vllm": 2**21})
    head = "| w1 | output_tokens_per_s |"
    assert f"{head} vattention | bf16 / bf16 | 40 (30 to 90) |  | 1 | 500 | 1 |  |" in table
    assert f"{head} vLLM | bf16 / bf16 | 20 (20 to 20) | 2.00 | 1 | 500 | 1 | 1 of 2 |" in table
    assert f"{head} OpenVINO | fp16 / bf16 | failed |" in table
    assert "- w1, OpenVINO: RuntimeError: no such model" in table
    assert "| vLLM | 3 (3 to 3) | 2 | engine 1.2 |" in table
    assert "vLLM, prefix cache" not in table
    assert f"{head} vLLM, prefix cache" not in table


def test_rows_are_compared_with_rows_of_ours() -> None:
    assert {row.against for row in ROWS} <= {row.name for row in ROWS if row.peer == "vattention"}
    assert {row.peer for row in chosen(["vllm"])} == {"vllm", "vattention"}
    assert chosen([]) == list(ROWS)
    with pytest.raises(ValueError, match="nobody: the peers are llamacpp"):
        chosen(["nobody"])
