"""Requests for the tests of engines."""

from __future__ import annotations

from vattention.bench.workload import BenchRequest
from vattention.sampling_params import SamplingParams


def request(num_prompt: int, max_tokens: int, n: int = 1) -> BenchRequest:
    params = SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True, temperature=1.0 if n > 1 else 0.0)
    return BenchRequest(list(range(3, 3 + num_prompt)), params)
