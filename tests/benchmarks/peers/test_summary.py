from __future__ import annotations

from benchmarks.peers.cases import Case, columns
from benchmarks.peers.rows import ROWS
from benchmarks.peers.summary import layout_lines, matrix, verdicts
from tests.benchmarks.peers.figures import figures, runs_of

ROW = {row.name: row for row in ROWS}
FIGURES = columns([Case("w2", "output_tokens_per_s", [])])
RUNS = runs_of(
    {
        "vattention": [figures(output_tokens_per_s=v, ttft_p50_s=0.1) for v in (40.0, 60.0)],
        "vattention, sliced": [figures(output_tokens_per_s=40.0, ttft_p50_s=0.1)],
        "vLLM": [figures(output_tokens_per_s=v, ttft_p50_s=0.105) for v in (20.0, 20.0)],
        "OpenVINO": [{"error": "broken"}],
    }
)
ROWS_RUN = [ROW[name] for name in ("vattention", "vattention, sliced", "vLLM", "OpenVINO", "vLLM, prefix cache")]


def test_verdicts_name_the_best_of_the_others() -> None:
    assert verdicts(FIGURES, ROWS_RUN, RUNS)[2:] == [
        "| w2 tokens/s | bf16 | 50 | vLLM | 20 | 2.50 (2.00 to 3.00) | 1.25 | met |",
        "| w2 TTFT, s | bf16 | 0.1 | vLLM | 0.105 | 1.05 (1.05 to 1.05) | 1.1 | **not met** |",
    ]


def test_the_matrix_has_a_column_for_each_figure() -> None:
    assert matrix(FIGURES, ROWS_RUN, RUNS) == [
        "| row | weights / KV | w2 tokens/s | w2 TTFT, s |",
        "|---|---|---:|---:|",
        "| vattention | bf16 / bf16 | 50 | 0.1 |",
        "| vattention, sliced | bf16 / bf16 | 40 (1.00) | 0.1 (1.00) |",
        "| vLLM | bf16 / bf16 | 20 (2.50) | 0.105 (1.05) |",
        "| OpenVINO | fp16 / bf16 | failed | failed |",
    ]


def test_a_line_says_which_layout_is_faster() -> None:
    (line,) = layout_lines(FIGURES, ROWS_RUN, RUNS)
    assert line.endswith("the default layout is 1.000 times as good as vattention, sliced (geometric mean).")
