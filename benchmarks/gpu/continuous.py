"""transformers' own continuous batching, over a paged cache, as a measure for whole engines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.models import RandomModel
from vattention.bench.workload import BenchRequest

_NEVER = -1
"""As end token: none."""


@torch.no_grad()
def generate_batch(machine: Machine, random: RandomModel, requests: Sequence[BenchRequest]) -> float:
    """Seconds for greedy requests, all at once, as `generate_batch` computes them: with its own choice of memory,
    batch and graphs, captured before. Each request has its own output length, which `generate_batch` lacks.
    """
    options: dict[str, Any] = {} if machine.is_gpu else {"num_blocks": 4 * len(requests), "max_batch_tokens": 256}
    generation = GenerationConfig(
        max_new_tokens=max(request.params.max_tokens or 1 for request in requests),
        do_sample=False,
        pad_token_id=0,
        eos_token_id=_NEVER,
    )
    before = random.model.config._attn_implementation
    random.model.set_attn_implementation("flash_attention_2" if _has_flash_attention(machine) else "sdpa")
    try:
        with random.model.continuous_batching_context_manager(
            generation_config=generation,
            continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False, **options),
            warmup=machine.is_gpu,
        ) as manager:
            _run(manager, [(list(requests[0].prompt_token_ids[:16]), 2)], "warm-up")
            began = time.perf_counter()
            _run(manager, [(list(r.prompt_token_ids), r.params.max_tokens or 1) for r in requests], "request")
            elapsed = time.perf_counter() - began
    finally:
        random.model.set_attn_implementation(before)
    return elapsed


def _has_flash_attention(machine: Machine) -> bool:
    """Its kernels for blocks, which are the fastest that transformers has."""
    return machine.is_gpu and find_spec("flash_attn") is not None


def _run(manager: Any, requests: Sequence[tuple[list[int], int]], name: str) -> None:
    for index, (prompt, num_output) in enumerate(requests):
        manager.add_request(prompt, request_id=f"{name} {index}", max_new_tokens=num_output, eos_token_id=_NEVER)
    wanted = {f"{name} {index}": num_output for index, (_, num_output) in enumerate(requests)}
    while wanted:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("the generation thread ended before all requests were done")
        elif result.error is not None:
            raise RuntimeError(f"{result.request_id}: {result.error}")
        elif result.is_finished() and len(result.generated_tokens) != wanted.pop(result.request_id):
            raise RuntimeError(f"{result.request_id} got {len(result.generated_tokens)} tokens")
