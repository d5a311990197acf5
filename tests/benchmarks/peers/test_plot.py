from __future__ import annotations

from pathlib import Path

from benchmarks.peers.cases import Case
from benchmarks.peers.plot import draw
from benchmarks.peers.rows import ROWS
from tests.benchmarks.peers.figures import figures, runs_of

CASES = [Case("w2", "output_tokens_per_s", []), Case("w4", "total_tokens_per_s", [])]


def test_the_picture_has_the_rows_that_ran_and_is_the_same_each_time(tmp_path: Path) -> None:
    ours = ("vattention", "vattention, int8", "vattention, prefix cache")
    names = (*ours, "vLLM", "vLLM, prefix cache", "llama.cpp, q8_0")
    done = [figures(output_tokens_per_s=v, total_tokens_per_s=v) for v in (10.0, 20.0)]
    runs = runs_of(dict.fromkeys(names, done))
    for name in ("a.svg", "b.svg"):
        draw(CASES, ROWS, runs, "demo", tmp_path / name)
    picture = (tmp_path / "a.svg").read_text()
    assert picture == (tmp_path / "b.svg").read_text()
    for text in ("vLLM (bf16)", "vLLM, prefix cache (bf16)", "llama.cpp, q8_0", "w2 TTFT, s", "w4 tokens/s, pre"):
        assert text in picture
    assert "OpenVINO" not in picture
