"""Whole engines: chat-like requests and long prompts by manager, and prompts with a common beginning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.gpu.continuous import generate_batch
from benchmarks.gpu.machine import Chart, Machine, Table
from benchmarks.gpu.models import LLAMA, RandomModel, configured, engine, random_model
from benchmarks.workloads import w4
from vattention.bench.memory.trace import SHAREGPT, draw_trace
from vattention.bench.throughput import measure, warm_up
from vattention.bench.workload import BenchRequest
from vattention.sampling_params import SamplingParams

MOST_OUTPUT = 256
LAST_ID = 100_000
MANAGERS: dict[str, dict[str, object]] = {
    "virtual": {"kv": "virtual"},
    "virtual, no graphs": {"kv": "virtual", "enforce_eager": True},
    "virtual, sliced": {"kv": "virtual", "kv_layout": "sliced"},
    "paged 16": {"kv": "paged", "block_size": 16},
    "paged 256": {"kv": "paged", "block_size": 256},
}


def chats(machine: Machine) -> Table:
    """Prompt and output lengths like ShareGPT's, all at once, greedy; every manager twice, by turns."""
    requests = _chats(6, 512, 8) if machine.tiny else _chats(128, LAST_ID, MOST_OUTPUT)
    rows = _by_managers(machine, random_model(LLAMA, machine), requests, tuple(MANAGERS), 64, 2048, 2)
    return Table(
        "Llama 3 8B, requests like ShareGPT's: virtual at least 1.15 times paged",
        rows,
        Chart("manager", "÷ best paged", (), 1.15),
    )


def long_prompts(machine: Machine) -> Table:
    """Prompts of 16,384 tokens with 128 out, all at once, greedy; every manager once more after the first round."""
    count, length, output = (2, 128, 4) if machine.tiny else (8, 16384, 128)
    rng = np.random.default_rng(0)
    last_id = 512 if machine.tiny else LAST_ID
    requests = [_greedy(rng.integers(1, last_id, length).tolist(), output) for _ in range(count)]
    names = ("virtual", "virtual, sliced", "paged 16", "paged 256")
    rows = _by_managers(machine, random_model(LLAMA, machine), requests, names, count, length + output, 2)
    return Table(
        f"Llama 3 8B, prompts of {length:,} tokens: virtual at least 1.15 times paged",
        rows,
        Chart("manager", "÷ best paged", (), 1.15),
    )


def beside_transformers(machine: Machine) -> Table:
    """The same requests through this engine and through transformers' continuous batching, one after the other."""
    requests = _chats(3, 512, 4) if machine.tiny else _chats(64, LAST_ID, 128)
    num_tokens = _num_tokens(requests)
    theirs = num_tokens / generate_batch(machine, random_model(LLAMA, machine, optimized=False), requests)
    ours = _rate(machine, random_model(LLAMA, machine), requests, "virtual", 64, 2048)
    rows: list[dict[str, object]] = [
        {"engine": "vattention", "tokens/s": ours, "÷ transformers": ours / theirs},
        {"engine": "transformers, generate_batch", "tokens/s": theirs, "÷ transformers": 1.0},
    ]
    return Table(
        "Llama 3 8B, requests like ShareGPT's: at least twice transformers' generate_batch",
        rows,
        Chart("engine", "÷ transformers", (), 2.0),
    )


def prefix(machine: Machine) -> Table:
    """32 prompts with 8,192 tokens in common and 64 of their own."""
    count, common, unique = (4, 64, 8) if machine.tiny else (32, 8192, 64)
    # The first seed's are for warming up: prompts of these lengths have graphs of their own.
    others, requests = (
        [
            _greedy([token % 512 for token in request["prompt_token_ids"]], 8)
            for request in w4(count, common, unique, 8, seed)
        ]
        for seed in range(2)
    )
    model = random_model(LLAMA, machine)
    rows: list[dict[str, object]] = []
    for name, caches in (("virtual", True), ("virtual", False), ("paged 16", True), ("paged 256", True)):
        config = configured(
            machine,
            max_num_seqs=count,
            max_num_batched_tokens=8192,
            enable_prefix_caching=caches,
            **MANAGERS[name],
        )
        with engine(machine, model, config, common + unique + 64) as running:
            measure(running, others)
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
    return Table(
        "A common beginning, computed once, and its memory there once: virtual not slower than paged",
        rows,
        Chart("manager", "time, s", ("prefix cache",)),
    )


def _by_managers(
    machine: Machine,
    model: RandomModel,
    requests: Sequence[BenchRequest],
    names: Sequence[str],
    max_num_seqs: int,
    max_len: int,
    num_rounds: int,
) -> list[dict[str, object]]:
    """Tokens per second of each manager, by turns."""
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(1 if machine.tiny else num_rounds):
        for name in names:
            rates[name].append(_rate(machine, model, requests, name, max_num_seqs, max_len))
    best_paged = max(max(found) for name, found in rates.items() if name.startswith("paged"))
    return [
        {
            "manager": name,
            "tokens/s, best": max(found),
            "worst": min(found),
            "÷ best paged": max(found) / best_paged,
        }
        for name, found in rates.items()
    ]


def _rate(
    machine: Machine,
    model: RandomModel,
    requests: Sequence[BenchRequest],
    name: str,
    max_num_seqs: int,
    max_len: int,
) -> float:
    config = configured(machine, max_num_seqs=max_num_seqs, max_num_batched_tokens=8192, **MANAGERS[name])
    with engine(machine, model, config, max_len) as running:
        warm_up(running, requests)
        return measure(running, requests).total_tokens_per_s


def _num_tokens(requests: Sequence[BenchRequest]) -> int:
    return sum(len(request.prompt_token_ids) + (request.params.max_tokens or 0) for request in requests)


def _greedy(prompt: list[int], num_output: int) -> BenchRequest:
    return BenchRequest(prompt, SamplingParams(max_tokens=num_output, temperature=0, ignore_eos=True))


def _chats(count: int, last_id: int, most_output: int) -> list[BenchRequest]:
    trace = draw_trace(SHAREGPT, count=count, requests_per_s=1.0, seed=0)
    rng = np.random.default_rng(0)
    return [
        _greedy(rng.integers(1, last_id, prompt).tolist(), min(output, most_output))
        for prompt, output in zip(trace.prompts.tolist(), trace.outputs.tolist(), strict=True)
    ]
