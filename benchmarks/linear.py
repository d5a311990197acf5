"""Milliseconds of linear layers by shape, rows and method, methods taking turns.

    python benchmarks/linear.py [--shapes 2048x640,640x2048] [--rows 1,8,64] [--dtype bfloat16] [--threads 2]

Each measurement walks over copies of the weight that together exceed the caches, as a model's layers do.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from vattention.model.linear_methods import METHODS

DEMO_SHAPES = "1024x640,256x640,640x1024,4096x640,640x2048,262144x640"
"""Gemma 3 270M: q; k and v; o; gate and up; down; the output layer."""
_COPIES_NBYTES = 80_000_000
_LEAST_S, _MOST_S = 0.2, 2.0


def measure(num_out: int, num_in: int, rows: int, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Median and least seconds of one product by each method's name."""
    copies = max(1, _COPIES_NBYTES // (num_out * num_in * dtype.itemsize))
    x = torch.randn(rows, num_in).to(dtype)
    weights = [torch.randn(num_out, num_in).to(dtype) for _ in range(copies)]
    packed = {m.name: [m.pack(w, None) for w in weights] for m in METHODS if m.available(dtype)}
    times: dict[str, list[float]] = {name: [] for name in packed}
    begin = time.perf_counter()
    turn = 0
    while turn < 3 or time.perf_counter() - begin < _LEAST_S * len(packed):
        for name, methods in packed.items():
            # Methods too slow to repeat are given fewer turns.
            if turn >= 3 and sum(times[name]) > _MOST_S:
                continue
            start = time.perf_counter()
            methods[turn % copies](x)
            times[name].append(time.perf_counter() - start)
        turn += 1
    return {name: (statistics.median(values[1:]), min(values[1:])) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", default=DEMO_SHAPES, help="out x in, such as 2048x640")
    parser.add_argument("--rows", default="1,4,8,16,64,256,2048")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    names = [method.name for method in METHODS if method.available(dtype)]
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, {args.threads} threads, {args.dtype}")
    print(
        "median (least) ms"
        + " " * 7
        + "".join(f"{name:>20}" for name in names)
        + f"{'best: GB/s':>14}{'GFLOP/s':>10}"
    )
    for shape in args.shapes.split(","):
        num_out, num_in = (int(size) for size in shape.split("x"))
        for rows in (int(rows) for rows in args.rows.split(",")):
            if rows * num_out > 1 << 26:
                continue
            with torch.no_grad():
                times = measure(num_out, num_in, rows, dtype)
            best = min(least for _, least in times.values())
            cells = "".join(f"{f'{times[n][0] * 1e3:.3f} ({times[n][1] * 1e3:.3f})':>20}" for n in names)
            bandwidth, speed = (num_out * num_in * work / best / 1e9 for work in (dtype.itemsize, 2 * rows))
            print(f"{shape:>14} {rows:>5} rows {cells}{bandwidth:14.1f}{speed:10.0f}", flush=True)


if __name__ == "__main__":
    main()
