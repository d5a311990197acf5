"""The driver's calls, and sequences that leave for the host's memory and come back."""

from __future__ import annotations

import statistics

import torch

from benchmarks.gpu.machine import Chart, Machine, Table
from benchmarks.mapping import CALLS, measure_bandwidth, measure_calls, measure_rows
from benchmarks.swapping import swap
from vattention.config import EngineConfig
from vattention.core import AttentionSpec
from vattention.kv.build import create_manager
from vattention.kv.swap import memory_space
from vattention.memory import open_driver


def driver(machine: Machine) -> Table:
    """By page size: the smallest that the device has, and 4 and 16 times that."""
    device = str(machine.device)
    smallest = open_driver(device)
    granularity = smallest.capabilities.granularity
    smallest.close()
    rows: list[dict[str, object]] = []
    for scale in (1,) if machine.tiny else (1, 4, 16):
        page_nbytes = granularity * scale
        opened = open_driver(device, page_nbytes)
        try:
            num_samples = 5 if machine.tiny else 100
            measure_calls(opened, 3)
            calls = measure_calls(opened, num_samples)
            commit_us, unmap_us = measure_rows(opened, 3 if machine.tiny else 10)
            nbytes = 64 * page_nbytes if machine.tiny else 4 * 2**30
            commit, again, back = measure_bandwidth(opened, nbytes, 3)
        finally:
            opened.close()
        rows.append(
            {
                "page, KiB": page_nbytes // 1024,
                **{f"{name}, µs": calls[name].median for name in CALLS},
                "36 rows, µs": commit_us.median,
                "36 rows unmapped, µs": unmap_us.median,
                "commit, GB/s": commit.median,
                "again, GB/s": again.median,
                "give back, GB/s": back.median,
            }
        )
    return Table(
        "The driver's calls: the paper has 40 µs for 2 MB, and needs 0.75 GB/s",
        rows,
        Chart("page, KiB", "commit, GB/s", (), 0.75),
    )


def swapping(machine: Machine) -> Table:
    """A long sequence of Llama 3 8B, by layout."""
    num_tokens = 256 if machine.tiny else 16384
    specs = [AttentionSpec(32, 8, 128, 128, 1.0)] * (2 if machine.tiny else 32)
    space = memory_space(1 << 40, str(machine.device))
    rows: list[dict[str, object]] = []
    for kv, layout in (("virtual", "per-layer"), ("virtual", "sliced"), ("paged", "per-layer")):
        config = EngineConfig(
            model="none",
            max_num_seqs=2,
            kv_memory="8GiB",
            kv=kv,  # type: ignore[arg-type]
            kv_layout=layout,  # type: ignore[arg-type]
            block_size=64,
        )
        manager = create_manager(
            config, specs, dtype=torch.bfloat16, device=str(machine.device), max_len=num_tokens
        )
        slot = manager.take((), max_tokens=num_tokens).slot
        manager.ensure(slot, 0, num_tokens)
        runs = manager.runs(slot, num_tokens)
        for run in runs:
            run.random_()
        machine.wait()
        nbytes, count = sum(run.nbytes for run in runs), len(runs)
        # No tensor of the cache may outlive its memory.
        del runs, run
        swap(manager, slot, space, num_tokens)
        times = [swap(manager, slot, space, num_tokens) for _ in range(3)]
        manager.close()
        out, back = (nbytes / statistics.median(one[way] for one in times) / 1e9 for way in (0, 1))
        rows.append({"manager": kv, "layout": layout, "runs": count, "out, GB/s": out, "in, GB/s": back})
    return Table(
        f"A sequence of {num_tokens:,} tokens to the host and back: near the bus's speed",
        rows,
        Chart("manager", "out, GB/s", ("layout",)),
    )
