"""Decode attention by kernel and cache: contiguous slots, and blocks of several sizes, taking turns.

The compiled kernel on contiguous slots against the same code that follows block tables, and torch's kernel. In each
turn every one walks, in an order drawn anew, over caches of its own, in all more than the processor's caches hold.
Blocks lie in random order. A ratio is one turn's time over that of `native` in the same turn, so that other work on
the machine hits both alike; what is shown is the median and the quartiles of these. With one thread it is processor
time, in which other processes do not count.

    python -m benchmarks.attention --json attention.json --markdown attention.md    # two to three minutes
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path

import torch

from benchmarks.mapping import surroundings
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

NATIVE = "native"
SLOT_KERNELS = (NATIVE, "sdpa")
LEAST_TURNS = 5
COPIES_NBYTES = 128_000_000
"""Of one kernel's caches, of which each has its own: with all of them more than a processor's last level holds."""
MOST_NBYTES = 600_000_000
"""Of one layer's cache, of which each kernel has a copy; larger cases are left out."""


@dataclass(frozen=True, slots=True)
class Quartiles:
    """The median, and what a quarter is below or above."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True, slots=True)
class Result:
    """One case.

    Attributes:
        nbytes: of keys and values that a call reads.
        native_s: one layer's call of the compiled kernel on contiguous slots.
        relative: by kernel, how many times as long a call takes.
    """

    shape: str
    batch: int
    context: int
    nbytes: int
    num_turns: int
    native_s: Quartiles
    relative: dict[str, Quartiles]


def measure(
    spec: AttentionSpec, num_seqs: int, context: int, block_sizes: Sequence[int], dtype: torch.dtype, seconds: float
) -> dict[str, list[float]]:
    """Seconds of one layer's call in each turn, by kernel and block size."""
    layers = max(1, COPIES_NBYTES // cache_nbytes(spec, num_seqs, context, dtype))
    query = torch.randn(num_seqs, spec.num_heads, spec.key_dim).to(dtype)
    batch = RaggedBatch.of([Chunk(slot, context - 1, [0], 0) for slot in range(num_seqs)])
    tokens = num_seqs, context, spec.num_kv_heads
    keys, values = (torch.randn(*tokens, dim).to(dtype) for dim in (spec.key_dim, spec.value_dim))
    view = LayerView(keys, values)
    calls: dict[str, tuple[str, list[CacheView]]] = {
        **{name: (name, [LayerView(keys.clone(), values.clone()) for _ in range(layers)]) for name in SLOT_KERNELS},
        **{paged(size): ("paged", [in_blocks(view, size) for _ in range(layers)]) for size in block_sizes},
    }
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def run(kernel: str, views: list[CacheView]) -> float:
        start = clock()
        for view in views:
            KERNELS[kernel](query, view, batch, spec, None)
        return (clock() - start) / layers

    for call in calls.values():
        run(*call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffled = list(calls), random.Random(0)
    begin = time.perf_counter()
    while len(times[NATIVE]) < LEAST_TURNS or time.perf_counter() - begin < seconds:
        shuffled.shuffle(order)
        for name in order:
            times[name].append(run(*calls[name]))
    return times


def paged(block_size: int) -> str:
    return f"paged {block_size}"


def cache_nbytes(spec: AttentionSpec, num_seqs: int, context: int, dtype: torch.dtype) -> int:
    return num_seqs * context * spec.num_kv_heads * (spec.key_dim + spec.value_dim) * dtype.itemsize


def results(
    shapes: Sequence[str],
    batches: Sequence[int],
    contexts: Sequence[int],
    block_sizes: Sequence[int],
    dtype: torch.dtype,
    seconds: float,
) -> Iterator[Result]:
    """Each case as it is measured."""
    for shape, num_seqs, context in product(shapes, batches, contexts):
        nbytes = cache_nbytes(SHAPES[shape], num_seqs, context, dtype)
        if nbytes > MOST_NBYTES:
            continue
        with torch.inference_mode():
            times = measure(SHAPES[shape], num_seqs, context, block_sizes, dtype, seconds)
        native = times.pop(NATIVE)
        relative = {
            name: Quartiles.of([t / n for t, n in zip(found, native, strict=True)]) for name, found in times.items()
        }
        yield Result(shape, num_seqs, context, nbytes, len(native), Quartiles.of(native), relative)


def header(names: Sequence[str]) -> str:
    titles = ["shape", "batch", "context", "turns", "native, µs", "GB/s", *names]
    return f"| {' | '.join(titles)} |\n|---|{'---:|' * (len(titles) - 1)}"


def row(result: Result) -> str:
    native = result.native_s
    cells = [
        result.shape,
        str(result.batch),
        f"{result.context:,}",
        str(result.num_turns),
        f"{native.median * 1e6:,.0f} ({native.lower * 1e6:,.0f} to {native.upper * 1e6:,.0f})",
        f"{result.nbytes / native.median / 1e9:.1f}",
        *(f"{r.median:.2f} ({r.lower:.2f} to {r.upper:.2f})" for r in result.relative.values()),
    ]
    return f"| {' | '.join(cells)} |"


def summary(found: Sequence[Result]) -> str:
    """Over all cases, for each kernel: the median of their medians, the least and the most."""
    cells = []
    for name in found[0].relative:
        medians = [result.relative[name].median for result in found]
        cells.append(f"{statistics.median(medians):.2f} ({min(medians):.2f} to {max(medians):.2f})")
    return f"| all cases: median, least, most | {'| ' * 5}{' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="per case, at least")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    environment = surroundings("cpu")
    lines = [
        f"{environment['cpu']}, {options.threads} threads, torch {torch.__version__}, {options.dtype}, "
        f"{date.today().isoformat()}. Times of `native`; of the others how many times as long: median (quartiles).",
        "",
        header(["sdpa", *map(paged, options.blocks)]),
    ]
    print("\n".join(lines), flush=True)
    found = []
    dtype = getattr(torch, options.dtype)
    for result in results(
        options.shapes, options.batches, options.contexts, options.blocks, dtype, options.seconds
    ):
        found.append(result)
        lines.append(row(result))
        print(lines[-1], flush=True)
    if found:
        lines.append(summary(found))
        print(lines[-1])
    if options.markdown is not None:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if options.json is not None:
        report = {
            "date": date.today().isoformat(),
            "command": shlex.join(["python", "-m", "benchmarks.attention", *(arguments or sys.argv[1:])]),
            "environment": environment,
            "threads": options.threads,
            "dtype": options.dtype,
            "cases": [asdict(result) for result in found],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
