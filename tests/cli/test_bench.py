from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.fakes import FakeRunner, fake_engine
from vattention.cli.main import USER_ERROR, main
from vattention.engine.engine import LLMEngine


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    runner = FakeRunner()
    monkeypatch.setattr(LLMEngine, "from_config", lambda _config: fake_engine(runner=runner))
    return runner


def requests(path: Path, max_tokens: int) -> list[str]:
    """Arguments that name a file of five requests."""
    line = json.dumps(
        {"prompt_token_ids": list(range(2, 22)), "max_tokens": max_tokens, "ignore_eos": True, "n": 2}
    )
    path.write_text(f"{line}\n" * 5)
    return ["--requests", str(path)]


def test_figures_are_shown_and_written(
    runner: FakeRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main(["bench", "throughput", "fake", *requests(tmp_path / "r.jsonl", 8), "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert (figures["num_requests"], figures["num_prompt_tokens"], figures["num_output_tokens"]) == (5, 100, 80)
    assert figures["output_tokens_per_s"] == pytest.approx(80 / figures["elapsed_s"])
    assert figures["total_tokens_per_s"] == pytest.approx(180 / figures["elapsed_s"])
    assert 0 < figures["ttft_p50_s"] <= figures["ttft_p99_s"] < figures["elapsed_s"]
    assert 0 < figures["itl_p50_s"] <= figures["itl_p99_s"]
    assert 0 < figures["kv_peak"]["mapped_nbytes"] <= figures["kv_peak"]["limit_nbytes"]
    assert "5 with 100 prompt tokens and 80 output tokens" in capsys.readouterr().out
    assert runner.closed


def test_a_context_too_short_for_the_work_is_an_error(
    runner: FakeRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "throughput", "fake", *requests(tmp_path / "r.jsonl", 100)]) == USER_ERROR
    assert "raise max_model_len to 120" in capsys.readouterr().err
    assert runner.closed


def test_an_output_that_cannot_be_written_is_known_before_the_model_loads(
    runner: FakeRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "none" / "out.json"
    assert (
        main(["bench", "throughput", "fake", *requests(tmp_path / "r.jsonl", 1), "--json", str(out)]) == USER_ERROR
    )
    assert "cannot write" in capsys.readouterr().err
    assert runner.num_forwards == 0
