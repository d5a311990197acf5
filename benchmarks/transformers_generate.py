"""The same work as `vattention bench throughput`, done by transformers' `generate` in padded batches.

    python -m benchmarks.transformers_generate MODEL --requests FILE.jsonl --json OUT

Prompts are padded on the left to the batch's longest, and a batch runs until its longest output is done; only the
tokens that requests asked for count. Loading the model and a short warm-up are not in the figures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria

from vattention.bench.resident import peak_resident_nbytes, resident_nbytes
from vattention.bench.throughput import WARM_UP_OUTPUT_TOKENS, WARM_UP_PROMPT_TOKENS, WARM_UP_REQUESTS
from vattention.bench.workload import BenchRequest, parse_requests
from vattention.model.demo import demo_folder

PAD = 0
DEMO = "demo"


class StepClock(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; notes when each step of `generate` ended, in `time.perf_counter()` seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate_batch(model: Any, batch: Sequence[BenchRequest], max_new_tokens: int) -> list[float]:
    """Complete one padded batch with `max_new_tokens` tokens each; returns when each token was there."""
    longest = max(len(request.prompt_token_ids) for request in batch)
    token_ids = torch.full((len(batch), longest), PAD)
    mask = torch.zeros_like(token_ids)
    for row, request in enumerate(batch):
        count = len(request.prompt_token_ids)
        token_ids[row, longest - count :] = torch.tensor(request.prompt_token_ids)
        mask[row, longest - count :] = 1
    params = batch[0].params
    sampling = {} if params.greedy else {"temperature": params.temperature, "top_k": 0, "top_p": 1.0}
    # What a passed configuration leaves open is taken from the model's own, which names end tokens.
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not params.greedy,
        num_return_sequences=params.n,
        pad_token_id=PAD,
        eos_token_id=None,
        **sampling,
    )
    clock = StepClock()
    with torch.inference_mode():
        out = model.generate(input_ids=token_ids, attention_mask=mask, stopping_criteria=[clock])
    if out.shape[1] != longest + max_new_tokens:
        raise RuntimeError(f"generate stopped after {out.shape[1] - longest} of {max_new_tokens} tokens")
    return clock.times


def measure(model: Any, requests: Sequence[BenchRequest], batch_size: int) -> dict[str, Any]:
    """Complete all requests, batch after batch, and return figures named as those of `bench throughput`."""
    firsts: list[float] = []
    gaps: list[float] = []
    rss_before = resident_nbytes()
    start = time.perf_counter()
    for begin in range(0, len(requests), batch_size):
        batch = requests[begin : begin + batch_size]
        wanted = [request.params.max_tokens or 1 for request in batch]
        times = generate_batch(model, batch, max(wanted))
        steps = [later - earlier for earlier, later in pairwise(times)]
        for request, count in zip(batch, wanted, strict=True):
            firsts.append(times[0] - start)
            gaps.extend(steps[: count - 1] * request.params.n)
    elapsed = time.perf_counter() - start
    num_prompt = sum(len(request.prompt_token_ids) for request in requests)
    num_output = sum((request.params.max_tokens or 1) * request.params.n for request in requests)
    ttft_p50, ttft_p99 = np.percentile(firsts, (50, 99)).tolist()
    itl_p50, itl_p99 = np.percentile(gaps, (50, 99)).tolist() if gaps else (None, None)
    return {
        "elapsed_s": elapsed,
        "prompt_tokens_per_s": num_prompt / elapsed,
        "output_tokens_per_s": num_output / elapsed,
        "total_tokens_per_s": (num_prompt + num_output) / elapsed,
        "ttft_p50_s": ttft_p50,
        "ttft_p99_s": ttft_p99,
        "itl_p50_s": itl_p50,
        "itl_p99_s": itl_p99,
        "peak_rss_bytes": peak_resident_nbytes(),
        "rss_before_bytes": rss_before,
        "num_requests": len(requests),
        "num_prompt_tokens": num_prompt,
        "num_output_tokens": num_output,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def warm_up(model: Any, requests: Sequence[BenchRequest]) -> None:
    """As much as our own benchmark does before it measures."""
    cut = [
        BenchRequest(request.prompt_token_ids[:WARM_UP_PROMPT_TOKENS], request.params)
        for request in requests[:WARM_UP_REQUESTS]
    ]
    generate_batch(model, cut, WARM_UP_OUTPUT_TOKENS)


def checkpoint(model: str) -> str:
    """What `from_pretrained` is to load, in the dtype it is stored in; the demo model is the same bfloat16 one."""
    return str(demo_folder()) if model == DEMO else model


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure transformers' generate in padded batches.")
    parser.add_argument("model")
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, help="requests per batch; all of them by default")
    arguments = parser.parse_args()
    requests = parse_requests(arguments.requests.read_text().splitlines(), str(arguments.requests))
    if len({(request.params.n, request.params.temperature) for request in requests}) != 1:
        raise SystemExit("one padded batch has one n and one temperature; these requests differ")
    if not all(request.params.ignore_eos for request in requests):
        raise SystemExit(
            "every request must have ignore_eos, so that both sides generate the same number of tokens"
        )
    model = AutoModelForCausalLM.from_pretrained(checkpoint(arguments.model), dtype="auto").eval()
    warm_up(model, requests)
    figures = measure(model, requests, arguments.batch_size or len(requests))
    arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
