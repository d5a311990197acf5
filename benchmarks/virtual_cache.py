"""Decode steps and peak memory of `VirtualCache` against transformers' dynamic and static caches.

One small random Llama decodes single tokens after prompts of growing length, with the caches taking turns in every
round, so that whatever else the machine does meets all of them alike. Writes JSON to standard output:
medians over the rounds, and the machine's load before and after. Peak memory is measured in a process of its own
per cache and length, as the growth of the resident set over a prompt and a few steps.

    python benchmarks/virtual_cache.py --lengths 512 2048 8192 --batch 1 --rounds 30
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from vattention.virtual_cache import VirtualCache

CACHES = ("virtual", "dynamic", "static")


def build_model(max_length: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=max_length,
    )
    return LlamaForCausalLM(config).eval()


def build_cache(kind: str, config: LlamaConfig, max_length: int) -> Any:
    if kind == "virtual":
        return VirtualCache(config)
    if kind == "dynamic":
        return DynamicCache(config=config)
    return StaticCache(config=config, max_cache_len=max_length)


def prefill(model: Any, cache: Any, batch: int, length: int) -> None:
    """Chunks keep the prompt's own activations out of the peak."""
    ids = torch.randint(0, 1024, (batch, length), generator=torch.Generator().manual_seed(1))
    for chunk in torch.split(ids, 256, dim=1):
        model(chunk, past_key_values=cache, logits_to_keep=1)


def resident_nbytes(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def measure_steps(batch: int, length: int, rounds: int, max_length: int) -> dict[str, float]:
    """Median milliseconds of one decode step for each cache."""
    model = build_model(max_length)
    caches = {kind: build_cache(kind, model.config, max_length) for kind in CACHES}
    token = torch.zeros(batch, 1, dtype=torch.int64)
    times: dict[str, list[float]] = {kind: [] for kind in CACHES}
    for cache in caches.values():
        prefill(model, cache, batch, length)
        model(token, past_key_values=cache)
    for _ in range(rounds):
        for kind, cache in caches.items():
            start = time.perf_counter()
            model(token, past_key_values=cache)
            times[kind].append(time.perf_counter() - start)
    return {kind: round(1000 * statistics.median(values), 3) for kind, values in times.items()}


def measure_peak(kind: str, batch: int, length: int, max_length: int) -> int:
    """Bytes by which a prompt and a few steps raised the most that was ever resident; once per process."""
    model = build_model(max_length)
    model(torch.zeros(batch, 256, dtype=torch.int64), use_cache=False, logits_to_keep=1)
    before = resident_nbytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    cache = build_cache(kind, model.config, max_length)
    prefill(model, cache, batch, length)
    for _ in range(8):
        model(torch.zeros(batch, 1, dtype=torch.int64), past_key_values=cache)
    return resident_nbytes("VmHWM") - before


def peak_of(kind: str, batch: int, length: int, max_length: int) -> int:
    arguments = ["--peak", kind, "--batch", batch, "--lengths", length, "--max-length", max_length]
    child = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    return int(child.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], help="tokens in the prompt")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--max-length", type=int, default=16384, help="what static and virtual caches are made for")
    parser.add_argument("--peak", choices=CACHES, help="only print this cache's peak memory")
    options = parser.parse_args()
    with torch.no_grad():
        if options.peak:
            print(measure_peak(options.peak, options.batch, options.lengths[0], options.max_length))
            return
        load = os.getloadavg()
        results = []
        for length in options.lengths:
            steps = measure_steps(options.batch, length, options.rounds, options.max_length)
            peaks = {kind: peak_of(kind, options.batch, length, options.max_length) for kind in CACHES}
            results.append({"num_tokens": length, "step_ms": steps, "peak_nbytes": peaks})
        report = {
            "batch": options.batch,
            "max_length": options.max_length,
            "rounds": options.rounds,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "load_before": load[0],
            "load_after": os.getloadavg()[0],
            "results": results,
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
