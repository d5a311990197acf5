"""Microseconds of decode attention by kernel and cache: contiguous slots and blocks of several sizes taking turns.

    python benchmarks/attention.py [--shapes demo,llama-1b,llama-8b] [--batches 1,4,16,64]
        [--contexts 256,1024,4096] [--blocks 1,8,16,32,64,128,256] [--threads 2] [--seconds 1] [--json OUT]

Every turn walks over the caches of several layers that together exceed the processor's caches. Blocks lie in random
order. Ratios are medians of those within one turn, so that other work on the machine hits both sides alike. With
one thread it is processor time, in which other processes do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vattention.attention.kernel import RaggedBatch
from vattention.attention.registry import KERNELS
from vattention.bench.numerics import in_blocks
from vattention.core import AttentionSpec, Chunk
from vattention.kv.manager import CacheView, LayerView

SHAPES = {
    "demo": AttentionSpec(4, 1, 256, 256, 256**-0.5),
    "llama-1b": AttentionSpec(32, 4, 64, 64, 64**-0.5),
    "llama-8b": AttentionSpec(32, 8, 128, 128, 128**-0.5),
}
"""Gemma 3 270M; 32 query heads on 4 of 64 numbers; 32 on 8 of 128."""
_COPIES_NBYTES = 200_000_000
_MOST_NBYTES = 2_000_000_000
"""Of one layer's cache; larger cases are left out."""


def measure(
    spec: AttentionSpec, num_seqs: int, context: int, block_sizes: list[int], dtype: torch.dtype, seconds: float
) -> dict[str, list[float]]:
    """Seconds of one layer's call in each turn, by kernel and block size."""
    nbytes = num_seqs * context * spec.num_kv_heads * (spec.key_dim + spec.value_dim) * dtype.itemsize
    layers = max(1, min(16, _COPIES_NBYTES // nbytes))
    query = torch.randn(num_seqs, spec.num_heads, spec.key_dim).to(dtype)
    batch = RaggedBatch.of([Chunk(slot, context - 1, [0], 0) for slot in range(num_seqs)])

    def random(dim: int) -> torch.Tensor:
        return torch.randn(num_seqs, context, spec.num_kv_heads, dim).to(dtype)

    slots = [LayerView(random(spec.key_dim), random(spec.value_dim)) for _ in range(layers)]
    calls: dict[str, tuple[str, list[CacheView]]] = {
        "native": ("native", [*slots]),
        "sdpa": ("sdpa", [*slots]),
        **{f"paged {size}": ("paged", [in_blocks(view, size) for view in slots]) for size in block_sizes},
    }

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def run(kernel: Callable[..., torch.Tensor], views: list[CacheView]) -> float:
        start = clock()
        for view in views:
            kernel(query, view, batch, spec, None)
        return (clock() - start) / layers

    for kernel, views in calls.values():
        run(KERNELS[kernel], views)
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    while len(times["native"]) < 3 or time.perf_counter() - begin < seconds:
        for name, (kernel, views) in calls.items():
            times[name].append(run(KERNELS[kernel], views))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--contexts", default="256,1024,4096")
    parser.add_argument("--blocks", default="1,8,16,32,64,128,256")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="per case, at least")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    blocks = [int(size) for size in args.blocks.split(",")]
    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.dtype}; time of `native`, others relative to it"
    )
    print(f"{'shape':>10}{'batch':>6}{'context':>8}{'native µs':>11}{'GB/s':>7}{'sdpa':>7}", end="")
    print("".join(f"{f'paged {size}':>10}" for size in blocks))
    found = []
    for shape in args.shapes.split(","):
        spec = SHAPES[shape]
        for num_seqs in map(int, args.batches.split(",")):
            for context in map(int, args.contexts.split(",")):
                nbytes = num_seqs * context * spec.num_kv_heads * (spec.key_dim + spec.value_dim) * dtype.itemsize
                if nbytes > _MOST_NBYTES:
                    continue
                with torch.inference_mode():
                    times = measure(spec, num_seqs, context, blocks, dtype, args.seconds)
                native = times.pop("native")
                ratios = {
                    name: statistics.median(t / n for t, n in zip(values, native, strict=True))
                    for name, values in times.items()
                }
                median = statistics.median(native)
                print(
                    f"{shape:>10}{num_seqs:>6}{context:>8}{median * 1e6:>11.1f}{nbytes / median / 1e9:>7.1f}",
                    end="",
                )
                print(f"{ratios['sdpa']:>7.2f}" + "".join(f"{ratios[f'paged {size}']:>10.2f}" for size in blocks))
                found.append(
                    {
                        "shape": shape,
                        "batch": num_seqs,
                        "context": context,
                        "turns": len(native),
                        "nbytes": nbytes,
                        "native_s": {"median": median, "least": min(native), "most": max(native)},
                        "relative_to_native": ratios,
                        "least_s": {name: min(values) for name, values in times.items()},
                    }
                )
    if args.json is not None:
        facts = {"torch": torch.__version__, "threads": args.threads, "dtype": args.dtype, "cases": found}
        args.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
