from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.peers.environments import TRANSFORMERS, Environment
from benchmarks.peers.worker import RunError, Worker
from tests.model.tiny import tiny_llama

WORK = [{"prompt_token_ids": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}]


def worker(*command: str) -> Worker:
    return Worker(TRANSFORMERS, [sys.executable, *command])


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RunError, match=r"ended with 1: .*No module named no_such_module"):
        worker("-m", "no_such_module").run(WORK, timeout_s=60)
    absent = Environment("absent", "absent", requirements=("absent",))
    with pytest.raises(RunError, match=r"absent is not installed; run python -m benchmarks\.peers\.install absent"):
        Worker(absent, [str(absent.python)])
    with pytest.raises(RunError, match="took longer"):
        worker("-c", "import time; time.sleep(60)").run(WORK, timeout_s=0.2)


def test_a_process_does_one_workload_after_another(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    script = "benchmarks.peers.engines.transformers_generate"
    one = worker("-m", script, str(tmp_path), "--longest", "6")
    first = one.run(WORK, timeout_s=120)
    second = one.run([*WORK, *WORK], timeout_s=120, idle_s=0.01)
    assert first["cold_start_s"] > 0
    assert second["cold_start_s"] is None
    assert (first["num_output_tokens"], second["num_output_tokens"]) == (3, 6)
    assert first["first_request_token_ids"] == second["first_request_token_ids"]
    assert "idle_cpu_share" in second
    one.close()


def test_work_that_may_end_early_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    one = worker("-m", "benchmarks.peers.engines.transformers_generate", str(tmp_path), "--longest", "6")
    with pytest.raises(RunError, match="every request needs ignore_eos"):
        one.run([{**WORK[0], "ignore_eos": False}], timeout_s=120)
