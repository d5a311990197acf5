"""Decode steps in which a sequence grows by a page, by where its memory comes from."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

from benchmarks.gpu.machine import Chart, Machine, Table
from benchmarks.gpu.models import LLAMA, Served, configured, random_model, served
from benchmarks.gpu.steps import LAYOUTS, begin
from vattention.core import Chunk
from vattention.memory import open_driver

MAPPINGS = ("synchronous", "overlapped", "warm")
"""Mapped when a step asks for it; by the mapper's thread during the step before; before the first step."""


@dataclass
class Steps:
    """Seconds of steps, and those of them that were spent waiting for memory."""

    quiet: list[float] = field(default_factory=list)
    growing: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)


def overlap(machine: Machine) -> Table:
    """Sequences of different lengths, so that now and then one of them grows, in all layers at once."""
    batch, least, rounds = (4, 16, 1) if machine.tiny else (8, 1024, 3)
    driver = open_driver(str(machine.device))
    page_nbytes = driver.page_nbytes
    driver.close()
    model = random_model(LLAMA, machine)
    rows: list[dict[str, object]] = []
    for layout in LAYOUTS:
        config = configured(
            machine, max_num_seqs=batch, kv_layout=layout, enable_prefix_caching=False, page_size=page_nbytes
        )
        with served(machine, model, config, 8 * least) as running:
            planes = 1 if layout == "sliced" else 2 * len(running.parts.cache_specs)
            per_page = page_nbytes * planes // running.token_nbytes
            found = {mapping: Steps() for mapping in MAPPINGS}
            for _ in range(rounds):
                for mapping in MAPPINGS:
                    _run(machine, running, mapping, batch, per_page, least, found[mapping])
        warm = statistics.median(found["warm"].growing)
        rows += [
            {
                "layout": layout,
                "tokens a page": per_page,
                "mapping": mapping,
                "step, ms": statistics.median(steps.quiet) * 1e3 if steps.quiet else None,
                "growing, ms": statistics.median(steps.growing) * 1e3,
                "÷ warm": statistics.median(steps.growing) / warm,
                # In the long run a sequence grows in one of so many steps as a page has tokens.
                "steady overhead, %": 100
                * min(1.0, batch / per_page)
                * (statistics.mean(steps.growing) / warm - 1),
                "waited, ms": statistics.median(steps.waited) * 1e3,
                "waited at most, ms": max(steps.waited) * 1e3,
            }
            for mapping, steps in found.items()
        ]
    return Table(
        "A sequence grows: overlapped at most 1.05 times warm memory's step, and 1 % in the long run",
        rows,
        Chart("mapping", "÷ warm", ("layout",), 1.05),
    )


def _run(
    machine: Machine, running: Served, mapping: str, batch: int, per_page: int, least: int, found: Steps
) -> None:
    """Every sequence comes to the end of a page once, one after the other as far as there are tokens for that."""
    manager = running.manager
    manager.drop_warm()
    num_steps = min(2 * batch, per_page)
    end = -(-max(least, num_steps + 2) // per_page) * per_page
    # Sequence i writes the first token of a page in step i * gap + 1.
    gap = max(1, num_steps // batch)
    starts = [end - (index * gap % num_steps) - 1 for index in range(batch)]
    slots = [begin(machine, running, start, end + num_steps) for start in starts]
    if mapping == "warm":
        for slot, start in zip(slots, starts, strict=True):
            manager.ensure(slot, start, start + num_steps)
    for step in range(num_steps):
        places = [(slot, start + step) for slot, start in zip(slots, starts, strict=True)]
        machine.wait()
        began = time.perf_counter()
        for slot, position in places:
            manager.ensure(slot, position, position + 1)
        waited = time.perf_counter() - began
        if mapping == "overlapped":
            manager.prefetch([(slot, position + 1, position + 2) for slot, position in places])
        predictions = running.runner.predict([Chunk(slot, position, [1], 1) for slot, position in places])
        predictions.likeliest(range(batch))
        machine.wait()
        seconds = time.perf_counter() - began
        if any(position == end for _, position in places):
            found.growing.append(seconds)
            found.waited.append(waited)
        elif step:
            found.quiet.append(seconds)
    for slot in slots:
        manager.release(slot)
