"""How fast a sequence's keys and values leave the cache and come back: bytes per second by manager and layout.

The cache of a model of 18 layers with one head of 256 numbers in bfloat16, 18 KiB a token; one sequence is swapped
out and in again, by turns with each manager, in memory and in a file.

    python -m benchmarks.swapping --tokens 4096 --json swapping.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.mapping import surroundings
from vattention.config import EngineConfig
from vattention.core import AttentionSpec
from vattention.kv.build import create_manager
from vattention.kv.manager import KVManager
from vattention.kv.swap import SwapSpace, file_space, memory_space

SPECS = [AttentionSpec(4, 1, 256, 256, 1.0)] * 18

MANAGERS: dict[str, dict[str, str]] = {
    "virtual, per layer": {"kv": "virtual", "kv_layout": "per-layer"},
    "virtual, sliced": {"kv": "virtual", "kv_layout": "sliced"},
    "paged, per layer": {"kv": "paged", "kv_layout": "per-layer"},
}


@dataclass(frozen=True)
class Result:
    """Median, lowest and highest of all rounds in GB/s.

    Attributes:
        num_runs: pieces of memory that one image is copied from.
    """

    manager: str
    space: str
    num_tokens: int
    num_runs: int
    nbytes: int
    out_gb_per_s: tuple[float, float, float]
    in_gb_per_s: tuple[float, float, float]


def swap(manager: KVManager, slot: int, space: SwapSpace, num_tokens: int) -> tuple[float, float]:
    """Seconds that swapping a slot out, and in again where there is memory for it already, takes."""
    begun = time.perf_counter()
    image = space.save(manager.runs(slot, num_tokens), num_tokens)
    saved = time.perf_counter()
    image.load(manager, slot)
    loaded = time.perf_counter()
    image.free()
    return saved - begun, loaded - saved


def measure(num_tokens: int, num_rounds: int, folder: str) -> list[Result]:
    spaces = {"memory": memory_space(1 << 40, "cpu"), "file": file_space(folder, None)}
    managers = {
        name: create_manager(
            EngineConfig(model="none", max_num_seqs=2, kv_memory="4GiB", **options),  # type: ignore[arg-type]
            SPECS,
            dtype=torch.bfloat16,
            device="cpu",
            max_len=num_tokens,
        )
        for name, options in MANAGERS.items()
    }
    slots = {}
    for name, manager in managers.items():
        slots[name] = manager.take((), max_tokens=num_tokens).slot
        manager.ensure(slots[name], 0, num_tokens)
        for run in manager.runs(slots[name], num_tokens):
            run.fill_(7)
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(num_rounds):
        for kind, space in spaces.items():
            for name, manager in managers.items():
                seconds.setdefault((name, kind), []).append(swap(manager, slots[name], space, num_tokens))
    results = []
    for (name, kind), times in seconds.items():
        runs = managers[name].runs(slots[name], num_tokens)
        nbytes = sum(run.nbytes for run in runs)
        out, back = (_spread([nbytes / one[way] / 1e9 for one in times]) for way in (0, 1))
        results.append(Result(name, kind, num_tokens, len(runs), nbytes, out, back))
    for manager in managers.values():
        manager.close()
    return results


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def table(results: list[Result]) -> str:
    lines = ["| manager | space | runs | MB | out, GB/s | in, GB/s |", "|---|---|---:|---:|---:|---:|"]
    for r in results:
        out, back = (f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in (r.out_gb_per_s, r.in_gb_per_s))
        lines.append(f"| {r.manager} | {r.space} | {r.num_runs:,} | {r.nbytes / 1e6:.1f} | {out} | {back} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 4096])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", default="/var/tmp", help="where the file is")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    results = [one for count in options.tokens for one in measure(count, options.rounds, options.folder)]
    print(table(results))
    if options.json is not None:
        content = {"surroundings": surroundings("cpu"), "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
