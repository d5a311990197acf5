"""Share of the engine's step time that waits for memory to be mapped, with and without the mapper thread.

    python -m benchmarks.mapping_in_steps --model demo --out benchmarks/results/mapping_in_steps.json

Each run decodes a batch from cold slots, so that every page is mapped in it. Runs with and without the mapper take
turns; figures are medians over runs, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks.workloads import w6
from vattention.config import EngineConfig
from vattention.engine.engine import LLMEngine
from vattention.kv.mapper import Mapper
from vattention.kv.virtual import VirtualManager
from vattention.sampling_params import SamplingParams


class Stopwatch:
    """Adds up the time inside a manager's `ensure`, which the engine waits for."""

    def __init__(self, manager: VirtualManager) -> None:
        self.elapsed_s = 0.0
        self.longest_s = 0.0
        self._ensure = manager.ensure
        manager.ensure = self  # type: ignore[method-assign]  # measured in place

    def __call__(self, slot: int, start: int, end: int) -> None:
        begin = time.perf_counter()
        self._ensure(slot, start, end)
        took = time.perf_counter() - begin
        self.elapsed_s += took
        self.longest_s = max(self.longest_s, took)


def decode(engine: LLMEngine, watch: Stopwatch, batch: int, context: int, num_tokens: int) -> dict[str, float]:
    """One run from cold slots; figures of the decode steps only."""
    engine.manager.drop_warm()
    for index, request in enumerate(w6(batch, context)):
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        engine.add_request(str(index), {"prompt_token_ids": request["prompt_token_ids"]}, params)
    while (
        any(s.num_computed < s.num_tokens - 1 for s in engine._scheduler.running) or engine._scheduler.num_waiting
    ):
        engine.step()
    watch.elapsed_s = watch.longest_s = 0.0
    begin, steps = time.perf_counter(), 0
    while engine.has_unfinished_requests():
        engine.step()
        steps += 1
    elapsed = time.perf_counter() - begin
    return {
        "step_ms": elapsed / steps * 1e3,
        "mapping_share": watch.elapsed_s / elapsed,
        "longest_wait_ms": watch.longest_s * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    engine = LLMEngine.from_config(EngineConfig(model=arguments.model, max_model_len=4096))
    manager = engine.manager
    assert isinstance(manager, VirtualManager)
    mappers: dict[str, Mapper | None] = {"with": manager._mapper, "without": None}
    watch = Stopwatch(manager)
    rows = []
    for batch in map(int, arguments.batches.split(",")):
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in mappers}
        for turn in range(arguments.runs + 1):
            for name, mapper in mappers.items():
                manager._mapper = mapper
                figures = decode(engine, watch, batch, arguments.context, arguments.tokens)
                if turn:  # the first is the warm-up
                    runs[name].append(figures)
        for name, measured in runs.items():
            row: dict[str, object] = {"batch": batch, "mapper": name}
            for key in measured[0]:
                values = [figures[key] for figures in measured]
                row[key] = [statistics.median(values), min(values), max(values)]
            rows.append(row)
            median = {key: statistics.median(figures[key] for figures in measured) for key in measured[0]}
            print(
                f"batch {batch:3}  {name:7} mapper  step {median['step_ms']:7.2f} ms  "
                f"mapping {median['mapping_share']:.2%}  longest wait {median['longest_wait_ms']:.2f} ms"
            )
    manager._mapper = mappers["with"]
    engine.close()
    if arguments.out:
        versions = {name: version(name) for name in ("vattention", "torch", "transformers")}
        arguments.out.write_text(
            json.dumps(
                {
                    "date": date.today().isoformat(),
                    "machine": platform.processor() or platform.machine(),
                    "kernel": platform.release(),
                    "versions": versions,
                    "options": {k: str(v) for k, v in vars(arguments).items()},
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
