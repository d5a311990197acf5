from __future__ import annotations

import pytest

from benchmarks.peers.cases import Case
from benchmarks.peers.report import num_same_tokens, to_markdown
from benchmarks.peers.rows import ROWS, chosen
from tests.benchmarks.peers.figures import figures, rates, runs_of

RATE = Case("w1", "output_tokens_per_s", [{"temperature": 0.0}])
ROW = {row.name: row for row in ROWS}


def test_same_tokens_are_counted_up_to_the_first_that_differs() -> None:
    assert num_same_tokens([figures((1, 2, 3, 4))], [figures((1, 2, 9, 4))]) == (2, 4)


def test_the_table_has_every_row_and_says_why_one_failed() -> None:
    done = {
        "vattention": rates(30, 40, 90),
        "vLLM": [
            figures((1, 3), output_tokens_per_s=20.0, idle_cpu_share=0.125),
            *(figures((1, 3), output_tokens_per_s=20.0, cold_start_s=start) for start in (None, 2.0)),
        ],
        "OpenVINO": [{"error": "Traceback\n  lines\nRuntimeError: no such model"}],
    }
    rows = [ROW[name] for name in ("vattention", "vLLM", "OpenVINO", "vLLM, prefix cache")]
    table = to_markdown("a machine", "peers_x", [RATE], rows, runs_of(done), {"vllm": 2**21})
    head = "| w1 | output_tokens_per_s |"
    assert f"{head} vattention | bf16 / bf16 | 40 (30 to 90) |  | 1 | 500 | 1 |  |" in table
    assert f"{head} vLLM | bf16 / bf16 | 20 (20 to 20) | 2.00 | 1 | 500 | 1 | 1 of 2 |" in table
    assert f"{head} OpenVINO | fp16 / bf16 | failed |" in table
    assert "- w1, OpenVINO: RuntimeError: no such model" in table
    assert "| vLLM | 3 | 2 (2 to 2) | 1 | 12.5% | 2 | engine 1.2 |" in table
    assert "| w1 tokens/s | bf16 | 40 | vLLM | 20 | 2.00 (1.50 to 4.50) | 1.3 | met |" in table
    assert "(peers_x.svg)" in table
    assert "vLLM, prefix cache" not in table
    assert f"{head} vLLM, prefix cache" not in table


def test_what_nobody_ran_has_no_column() -> None:
    ran = {("w1", "vattention"): rates(30)}
    cases = [RATE, Case("w3", "ttft_p50_s", [{"temperature": 0.0}])]
    table = to_markdown("a machine", "peers_x", cases, ROWS, lambda case, row: ran.get((case, row), []), {})
    assert "| w1 tokens/s |" in table
    assert "w3" not in table


def test_rows_are_compared_with_rows_of_ours() -> None:
    assert {row.against for row in ROWS} <= {row.name for row in ROWS if row.peer == "vattention"}
    assert {row.peer for row in chosen(["vllm"])} == {"vllm", "vattention"}
    assert chosen([]) == list(ROWS)
    assert [row.name for row in chosen([], ["vLLM", "vattention, int8"])] == ["vattention, int8", "vLLM"]
    with pytest.raises(ValueError, match="nobody: the peers are llamacpp"):
        chosen(["nobody"])
    with pytest.raises(ValueError, match="vllm: the rows are vattention; "):
        chosen([], ["vllm"])
