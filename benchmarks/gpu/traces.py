"""Whole engines: chat-like requests by manager, and prompts with a common beginning."""

from __future__ import annotations

import numpy as np

from benchmarks.gpu.machine import Machine, Table
from benchmarks.gpu.models import LLAMA, QWEN, configured, engine, random_model
from benchmarks.workloads import w4
from vattention.bench.memory.trace import SHAREGPT, draw_trace
from vattention.bench.throughput import measure, warm_up
from vattention.bench.workload import BenchRequest
from vattention.sampling_params import SamplingParams

MOST_OUTPUT = 256
MANAGERS: dict[str, dict[str, object]] = {
    "virtual": {"kv": "virtual"},
    "virtual, no graphs": {"kv": "virtual", "enforce_eager": True},
    "virtual, sliced": {"kv": "virtual", "kv_layout": "sliced"},
    "paged 16": {"kv": "paged", "block_size": 16},
    "paged 256": {"kv": "paged", "block_size": 256},
}


def serving(machine: Machine) -> Table:
    """Prompt and output lengths like ShareGPT's, all at once, greedy; every manager twice, by turns."""
    shape = QWEN
    requests = _chats(6, 512, 8) if machine.tiny else _chats(96, 100_000, MOST_OUTPUT)
    model = random_model(shape, machine)
    rates: dict[str, list[float]] = {name: [] for name in MANAGERS}
    for _ in range(1 if machine.tiny else 2):
        for name, options in MANAGERS.items():
            config = configured(machine, max_num_seqs=64, max_num_batched_tokens=8192, **options)
            with engine(machine, model, config, 2048) as running:
                warm_up(running, requests)
                found = measure(running, requests)
            rates[name].append(found.total_tokens_per_s)
    best_paged = max(max(found) for name, found in rates.items() if name.startswith("paged"))
    rows: list[dict[str, object]] = [
        {
            "model": shape,
            "manager": name,
            "tokens/s, best": max(found),
            "worst": min(found),
            "÷ best paged": max(found) / best_paged,
        }
        for name, found in rates.items()
    ]
    return Table("ShareGPT-like requests: virtual at least 1.0 times paged", rows)


def _chats(count: int, last_id: int, most_output: int) -> list[BenchRequest]:
    trace = draw_trace(SHAREGPT, count=count, requests_per_s=1.0, seed=0)
    rng = np.random.default_rng(0)
    return [
        BenchRequest(
            rng.integers(1, last_id, prompt).tolist(),
            SamplingParams(max_tokens=min(output, most_output), temperature=0, ignore_eos=True),
        )
        for prompt, output in zip(trace.prompts.tolist(), trace.outputs.tolist(), strict=True)
    ]


def prefix(machine: Machine) -> Table:
    """32 prompts with 8,192 tokens in common and 64 of their own."""
    count, common, unique = (4, 64, 8) if machine.tiny else (32, 8192, 64)
    requests = [
        BenchRequest(
            [token % 512 for token in request["prompt_token_ids"]],
            SamplingParams(max_tokens=8, temperature=0, ignore_eos=True),
        )
        for request in w4(count, common, unique, 8)
    ]
    model = random_model(LLAMA, machine)
    rows: list[dict[str, object]] = []
    for name, caches in (("virtual", True), ("virtual", False), ("paged 16", True)):
        config = configured(
            machine,
            max_num_seqs=count,
            max_num_batched_tokens=8192,
            enable_prefix_caching=caches,
            **MANAGERS[name],
        )
        with engine(machine, model, config, common + unique + 64) as running:
            found = measure(running, requests)
        rows.append(
            {
                "manager": name,
                "prefix cache": "on" if caches else "off",
                "time, s": found.elapsed_s,
                "first token, p50 s": found.ttft_p50_s,
                "live GB at most": found.kv_peak["live_nbytes"] / 1e9,
                "shared GB at most": found.kv_peak["shared_nbytes"] / 1e9,
            }
        )
    return Table("A common beginning: computed once, and its memory there once", rows)
