from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.peers.__main__ import missing, turns
from benchmarks.peers.cases import Case
from benchmarks.peers.environments import TRANSFORMERS, Environment
from benchmarks.peers.installed import installed_nbytes
from benchmarks.peers.rows import ROWS
from benchmarks.peers.runs import Results, RunError, run_process

CASE = Case("w2", "output_tokens_per_s", [])


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RunError, match=r"ended with 1: .*No module named no_such_module"):
        run_process(TRANSFORMERS, [sys.executable, "-m", "no_such_module"], [], timeout_s=60)
    absent = Environment("absent", "absent", requirements=("absent",))
    with pytest.raises(RunError, match=r"absent is not installed; run python -m benchmarks\.peers\.install absent"):
        run_process(absent, [str(absent.python)], [], timeout_s=60)
    with pytest.raises(RunError, match="took longer"):
        run_process(TRANSFORMERS, [sys.executable, "-c", "import time; time.sleep(60)"], [], timeout_s=0.2)


def test_a_comparison_goes_on_where_it_stopped(tmp_path: Path) -> None:
    rows = [row for row in ROWS if row.name in ("vattention", "vattention, sliced", "vattention, prefix cache")]
    results = Results(tmp_path / "runs.json", {"model": "demo"})
    wanted = [(row.name, number) for number in range(2) for row in turns(number, rows) if row.takes("w2")]
    assert [row.name for _, row in missing([CASE], rows, 2, results)] == [name for name, _ in wanted]
    for name, _ in wanted[:1]:
        results.add("w2", name, {"error": "broken"})
    again = Results(tmp_path / "runs.json", {"model": "demo"})
    assert [row.name for _, row in missing([CASE], rows, 2, again)] == [name for name, _ in wanted[1:]]
    again.forget_failures()
    assert len(list(missing([CASE], rows, 2, again))) == len(wanted)
    with pytest.raises(ValueError, match="choose another --output"):
        Results(tmp_path / "runs.json", {"model": "llama-1b"})


def test_turns_change_from_run_to_run() -> None:
    rows = list(ROWS[:3])
    firsts = [turns(number, rows)[0].name for number in range(6)]
    assert set(firsts) == {row.name for row in rows}
    assert all(sorted(r.name for r in turns(n, rows)) == sorted(r.name for r in rows) for n in range(4))


def test_an_installation_is_counted_with_what_it_needs() -> None:
    assert installed_nbytes("safetensors") < 20 * 2**20 < installed_nbytes("transformers")
