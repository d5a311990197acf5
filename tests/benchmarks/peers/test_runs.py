from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.__main__ import machine, main, measure, missing, turns
from benchmarks.peers.cases import Case
from benchmarks.peers.installed import installed_nbytes
from benchmarks.peers.rows import ROWS, Row
from benchmarks.peers.runs import Results
from benchmarks.peers.worker import RunError
from benchmarks.peers.workers import Workers

CASE = Case("w2", "output_tokens_per_s", [])


def test_a_comparison_goes_on_where_it_stopped(tmp_path: Path) -> None:
    rows = [row for row in ROWS if row.name in ("vattention", "vattention, sliced", "vattention, prefix cache")]
    results = Results(tmp_path / "runs.json", {"model": "demo"})
    wanted = [(row.name, number) for number in range(2) for row in turns(number, rows) if row.takes("w2")]
    assert [row.name for _, _, row in missing([CASE], rows, 2, results)] == [name for name, _ in wanted]
    for name, _ in wanted[:1]:
        results.add("w2", name, {"error": "broken"})
    again = Results(tmp_path / "runs.json", {"model": "demo"})
    assert [row.name for _, _, row in missing([CASE], rows, 2, again)] == [name for name, _ in wanted[1:]]
    again.forget_failures()
    assert len(list(missing([CASE], rows, 2, again))) == len(wanted)
    with pytest.raises(ValueError, match="choose another --output"):
        Results(tmp_path / "runs.json", {"model": "llama-1b"})


class Fakes(Workers):
    """Workers without processes: the second row always fails."""

    def __init__(self) -> None:
        super().__init__("demo", 1, 1.0)
        self.seen: list[str] = []

    def run(self, _case: Case, row: Row) -> dict[str, Any]:
        self.seen.append(row.name)
        if row is ROWS[1]:
            raise RunError("Traceback\nbroken")
        return {CASE.figure: 1.0}

    def close(self) -> None:
        self.seen.append("closed")


def test_a_round_begins_with_new_processes_and_ends_when_time_is_over(tmp_path: Path) -> None:
    results, workers = Results(tmp_path / "runs.json", {}), Fakes()
    left = list(missing([CASE], ROWS[:2], 2, results))
    measure(left, workers, results, limit_s=0.0)
    assert workers.seen == []
    measure(left, workers, results, limit_s=60.0)
    assert workers.seen == [ROWS[0].name, ROWS[1].name, "closed", ROWS[0].name, ROWS[1].name]
    assert results.runs("w2", ROWS[0].name) == [{CASE.figure: 1.0}] * 2
    assert results.runs("w2", ROWS[1].name) == [{"error": "Traceback\nbroken"}] * 2


def test_the_report_is_of_all_that_was_ever_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Results, "add_installed", lambda *_: None)
    conditions = {"machine": machine(), "model": "demo", "scale": 1.0}
    Results(tmp_path / "x.json", conditions).add("w2", "vLLM", {"error": "broken"})
    assert main(["--peers", "llamacpp", "--limit-minutes", "0", "--output", str(tmp_path / "x")]) == 0
    assert "- w2, vLLM: broken" in (tmp_path / "x.md").read_text()
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_turns_change_from_run_to_run() -> None:
    rows = list(ROWS[:3])
    firsts = [turns(number, rows)[0].name for number in range(6)]
    assert set(firsts) == {row.name for row in rows}
    assert all(sorted(r.name for r in turns(n, rows)) == sorted(r.name for r in rows) for n in range(4))


def test_an_installation_is_counted_with_what_it_needs() -> None:
    assert installed_nbytes("safetensors") < 20 * 2**20 < installed_nbytes("transformers")
