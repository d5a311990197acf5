from __future__ import annotations

import pytest

from benchmarks.transformers_generate import generate_batch, measure, warm_up
from tests.model.tiny import tiny_llama
from vattention.bench.workload import BenchRequest
from vattention.sampling_params import SamplingParams


def request(num_prompt: int, max_tokens: int, n: int = 1) -> BenchRequest:
    params = SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True, temperature=1.0 if n > 1 else 0.0)
    return BenchRequest(list(range(3, 3 + num_prompt)), params)


def test_only_tokens_that_were_asked_for_count() -> None:
    figures = measure(tiny_llama(), [request(5, 4), request(9, 2), request(3, 1)], batch_size=2)
    assert (figures["num_requests"], figures["num_prompt_tokens"], figures["num_output_tokens"]) == (3, 17, 7)
    assert figures["output_tokens_per_s"] == pytest.approx(7 / figures["elapsed_s"])
    assert 0 < figures["ttft_p50_s"] <= figures["ttft_p99_s"] <= figures["elapsed_s"]
    assert 0 < figures["itl_p50_s"] <= figures["itl_p99_s"]


def test_samples_of_one_prompt_all_count() -> None:
    figures = measure(tiny_llama(), [request(5, 4, n=3)], batch_size=1)
    assert figures["num_output_tokens"] == 12


def test_end_tokens_end_nothing() -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = list(range(400))
    assert len(generate_batch(model, [request(5, 6)], 6)) == 6


def test_warm_up_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[int], int]] = []
    monkeypatch.setattr(
        "benchmarks.transformers_generate.generate_batch",
        lambda _model, batch, tokens: seen.append(([len(request.prompt_token_ids) for request in batch], tokens)),
    )
    warm_up(None, [request(300, 50)] * 10)
    assert seen == [([128] * 4, 4)]
