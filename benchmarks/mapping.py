"""What mapping memory costs: microseconds per driver call and bytes per second, by page size.

In the manner of the vAttention paper (arXiv 2405.04437), which gives the latency of each CUDA call by page group
size (table 3) and the bandwidth at which memory can be allocated (table 4). Here it is the driver's operations on
one page a call, far from every other; `Region` growing by one page in each of 36 rows, as a batch does; and the
bandwidth of committing a contiguous range and giving it back.

    python benchmarks/mapping.py --device cpu --json mapping.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from vattention.config import parse_nbytes
from vattention.memory import open_driver
from vattention.memory.driver import Driver
from vattention.memory.pool import PagePool
from vattention.memory.region import Region

PAGE_SIZES = ("4KiB", "16KiB", "64KiB", "256KiB", "1MiB", "2MiB")
CALLS = ("create", "map", "set_access", "alias", "unmap alias", "unmap", "release")
ROWS = 36
BUDGET_NBYTES = 512 * 2**20


@dataclass(frozen=True)
class Spread:
    """Median, and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        ordered = np.percentile(samples, [10, 90])
        return cls(statistics.median(samples), float(ordered[0]), float(ordered[1]))


@dataclass(frozen=True)
class Result:
    """One page size.

    Attributes:
        call_us: by operation, one page a call.
        commit_rows_us, unmap_rows_us: `Region.commit` and `unmap` of one page in each of 36 rows.
        commit_gb_per_s: a contiguous range, from nothing.
        recommit_gb_per_s: the same again, with recycled handles where the driver keeps them.
        give_back_gb_per_s: unmapping it until the memory is back with the system.
    """

    page_nbytes: int
    call_us: dict[str, Spread]
    commit_rows_us: Spread
    unmap_rows_us: Spread
    commit_gb_per_s: Spread
    recommit_gb_per_s: Spread
    give_back_gb_per_s: Spread


class Stopwatch:
    """Times by name, in microseconds."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter_ns()
        yield
        self.samples.setdefault(name, []).append((time.perf_counter_ns() - start) / 1e3)

    def spread(self, name: str) -> Spread:
        return Spread.of(self.samples[name])


def measure_calls(driver: Driver, num_samples: int) -> dict[str, Spread]:
    """Each operation on one page, far from every other."""
    page, stride = driver.page_nbytes, 3 * driver.page_nbytes
    start = driver.reserve((num_samples + 1) * stride)
    timed = Stopwatch()
    for i in range(num_samples):
        here = np.array([start + i * stride])
        there = here + page
        with timed("create"):
            handles = driver.create(here)
        with timed("map"):
            driver.map(here, handles)
        with timed("set_access"):
            driver.set_access(here)
        with timed("alias"):
            driver.map(there, handles)
        driver.set_access(there)
        with timed("unmap alias"):
            driver.unmap(there)
        with timed("unmap"):
            driver.unmap(here)
        with timed("release"):
            driver.release(handles)
    driver.free(start)
    return {name: timed.spread(name) for name in CALLS}


def measure_rows(driver: Driver, num_samples: int) -> tuple[Spread, Spread]:
    """One page more in each of 36 rows, and all of them given up again."""
    pool = PagePool(driver, driver.memory_info().available_nbytes)
    region = Region(driver, pool, ROWS * (2 * num_samples + 1) * driver.page_nbytes)
    rows = np.arange(ROWS) * (2 * num_samples + 1)
    timed = Stopwatch()
    for step in range(num_samples):
        with timed("commit"):
            region.commit(rows + 2 * step)
    for step in range(num_samples):
        with timed("unmap"):
            region.unmap(rows + 2 * step)
    region.close()
    pool.release_idle()
    return timed.spread("commit"), timed.spread("unmap")


def measure_bandwidth(driver: Driver, nbytes: int, num_samples: int) -> tuple[Spread, Spread, Spread]:
    """A contiguous range in bytes per nanosecond: committed, committed again, given back."""
    pool = PagePool(driver, nbytes + driver.page_nbytes)
    region = Region(driver, pool, nbytes)
    everything = np.arange(region.num_pages)
    timed = Stopwatch()
    for _ in range(num_samples):
        with timed("commit"):
            region.commit(everything)
        region.unmap(everything)
        with timed("recommit"):
            region.commit(everything)
        with timed("give back"):
            region.unmap(everything)
            pool.release_idle()
    region.close()

    def bandwidth(name: str) -> Spread:
        return Spread.of([region.nbytes / us / 1e3 for us in timed.samples[name]])

    return bandwidth("commit"), bandwidth("recommit"), bandwidth("give back")


def measure(device: str, page_nbytes: int, num_samples: int) -> Result:
    driver = open_driver(device, page_nbytes)
    try:
        # Never more than the budget: large pages get fewer samples.
        num_rows = max(min(num_samples, BUDGET_NBYTES // (ROWS * page_nbytes)), 5)
        measure_calls(driver, 10)
        calls = measure_calls(driver, num_samples)
        commit_rows, unmap_rows = measure_rows(driver, num_rows)
        return Result(
            page_nbytes,
            calls,
            commit_rows,
            unmap_rows,
            *measure_bandwidth(driver, BUDGET_NBYTES, max(num_samples // 20, 3)),
        )
    finally:
        driver.close()


def surroundings(device: str) -> dict[str, str]:
    """What the figures depend on."""
    found = {"device": device, "machine": platform.machine(), "kernel": platform.release()}
    found["python"] = platform.python_version()
    for package in ("numpy", "torch", "transformers", "triton", "cuda-bindings"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    found["cpu"] = f"{cpus[0].partition(':')[2].strip()} x {len(cpus)}" if cpus else platform.processor()
    huge = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if huge.exists():
        found["shmem huge pages"] = huge.read_text().strip()
    if device.startswith("cuda"):
        import torch

        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
    return found


def table(results: list[Result]) -> str:
    """One row per quantity, one column per page size: median (10th to 90th percentile)."""
    columns = [f"{r.page_nbytes // 1024} KiB" for r in results]
    rows = [(f"{name}, µs", [r.call_us[name] for r in results]) for name in CALLS]
    rows += [
        (f"commit {ROWS} rows, µs", [r.commit_rows_us for r in results]),
        (f"unmap {ROWS} rows, µs", [r.unmap_rows_us for r in results]),
        ("commit, GB/s", [r.commit_gb_per_s for r in results]),
        ("commit again, GB/s", [r.recommit_gb_per_s for r in results]),
        ("give back, GB/s", [r.give_back_gb_per_s for r in results]),
    ]
    lines = [" " * 20 + "".join(f"{column:>24}" for column in columns)]
    for name, spreads in rows:
        cells = (f"{s.median:.1f} ({s.p10:.1f}-{s.p90:.1f})" for s in spreads)
        lines.append(f"{name:<20}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda:N, or meta for the cost of bookkeeping alone")
    parser.add_argument(
        "--page-sizes", nargs="+", help="such as 4KiB 2MiB; by default all that the device can have"
    )
    parser.add_argument("--samples", type=int, default=200, help="of each call")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()

    driver = open_driver(options.device)
    granularity = driver.capabilities.granularity
    driver.close()
    sizes = [parse_nbytes(size) for size in options.page_sizes or PAGE_SIZES]
    if options.page_sizes is None:
        sizes = [size for size in sizes if size % granularity == 0]
    environment = surroundings(options.device)
    print("\n".join(f"{name}: {value}" for name, value in environment.items()), file=sys.stderr)
    results = [measure(options.device, size, options.samples) for size in sizes]
    print(table(results))
    if options.json:
        report = {"environment": environment, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
