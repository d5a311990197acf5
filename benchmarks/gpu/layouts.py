"""Decode attention over memory that is mapped page by page, in both layouts, beside memory that torch allocated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.gpu.kernels import SPEC, random_cache, token_nbytes
from benchmarks.gpu.machine import Chart, Machine, Table
from benchmarks.gpu.models import configured
from benchmarks.gpu.steps import LAYOUTS
from vattention.attention.kernel import AttentionKernel, RaggedBatch
from vattention.attention.registry import choose
from vattention.core import Chunk
from vattention.kv.build import create_manager
from vattention.kv.manager import CacheView, LayerView

NUM_LAYERS = 32
CASES = ((64, 1024), (8, 8192), (1, 131072), (8, 32768))
"""Sequences, and tokens of each."""


def layouts(machine: Machine) -> Table:
    """One call for each of Llama 3 8B's layers, so that no layer's memory is in a cache when its turn comes."""
    cases, num_layers = (((2, 64),), 2) if machine.tiny else (CASES, NUM_LAYERS)
    rows: list[dict[str, object]] = []
    for batch, context in cases:
        nbytes = batch * context * token_nbytes(machine) * num_layers
        if nbytes > machine.free_nbytes * 0.6:
            continue
        found = {
            "torch's": _plain(machine, batch, context, num_layers),
            **{layout: _mapped(machine, layout, batch, context, num_layers) for layout in LAYOUTS},
        }
        rows += [
            {
                "batch": batch,
                "context": context,
                "memory": name,
                "kernel": kernel,
                "GB/s": nbytes / num_layers / seconds / 1e9,
                "÷ torch's": found["torch's"][1] / seconds,
            }
            for name, (kernel, seconds) in found.items()
        ]
    return Table(
        "Decode attention on mapped memory: the layout whose reads are as fast as torch's memory is the default",
        rows,
        Chart("context", "÷ torch's", ("memory", "batch"), 1.0),
    )


def _plain(machine: Machine, batch: int, context: int, num_layers: int) -> tuple[str, float]:
    views = [LayerView(*random_cache(machine, batch, context)) for _ in range(num_layers)]
    return _measure(machine, views, list(range(batch)), context)


def _mapped(machine: Machine, layout: str, batch: int, context: int, num_layers: int) -> tuple[str, float]:
    machine.give_back()
    config = configured(machine, max_num_seqs=batch, kv_layout=layout, enable_prefix_caching=False)
    specs = [SPEC] * num_layers
    device = str(machine.device)
    manager = create_manager(config, specs, dtype=machine.dtype, device=device, max_len=context)
    try:
        slots = [manager.take((), max_tokens=context).slot for _ in range(batch)]
        for slot in slots:
            manager.ensure(slot, 0, context)
            for run in manager.runs(slot, context):
                run.view(machine.dtype).normal_()
        views = [manager.layer(layer) for layer in range(num_layers)]
        return _measure(machine, views, slots, context)
    finally:
        machine.wait()
        manager.close()


def _measure(machine: Machine, views: Sequence[CacheView], slots: list[int], context: int) -> tuple[str, float]:
    """The kernel that an engine would take, and its time for one layer."""
    query = torch.randn(len(slots), SPEC.num_heads, SPEC.key_dim, dtype=machine.dtype, device=machine.device)
    kernel: AttentionKernel[CacheView] = choose("auto", SPEC, views[0])
    batch = RaggedBatch.of([Chunk(slot, context - 1, [0], 0) for slot in slots], machine.device)
    with torch.inference_mode():
        seconds = machine.seconds_each([partial(kernel, query, view, batch, SPEC, None) for view in views])
    return kernel.name, seconds
