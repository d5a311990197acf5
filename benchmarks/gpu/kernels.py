"""Attention of one layer over contiguous slots and over blocks, by every kernel that runs here: decode steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product

import torch

from benchmarks.gpu.machine import GRAPH_COPIES_NBYTES, Chart, Machine, Table
from vattention.attention.fixed_batch import fixed_batch
from vattention.attention.kernel import AttentionKernel, RaggedBatch
from vattention.attention.registry import KERNELS
from vattention.core import AttentionSpec, Chunk
from vattention.kv.manager import CacheView, LayerView, PagedLayerView
from vattention.model.decode_graphs import key_bounds

SPEC = AttentionSpec(32, 8, 128, 128, 128**-0.5)
"""Llama 3 8B's layers."""

BATCHES = (1, 8, 64)
CONTEXTS = (1024, 8192, 32768, 196608)
BLOCK_SIZES = (16, 64, 256)
SLOW = ("gathered", "sdpa")
"""One call per sequence: not worth the time where there are many."""
COPIES = "torch_flash_gathered"
"""For prompts, whose rows share the copy."""
NEVER = "eager"
MOST_COPIES = 32


def decode(machine: Machine) -> Table:
    cases = ((1, 256), (2, 256)) if machine.tiny else tuple(product(BATCHES, CONTEXTS))
    rows = [row for batch, context in cases for row in _case(machine, batch, context)]
    return Table(
        "Decode attention, one layer of Llama 3 8B: slots at least as fast as blocks, 1.2 times in the paper",
        rows,
        Chart("context", "slots ÷ blocks", ("batch",), 1.0),
    )


def token_nbytes(machine: Machine) -> int:
    """Of a token's keys and values in one layer."""
    return SPEC.num_kv_heads * (SPEC.key_dim + SPEC.value_dim) * machine.dtype.itemsize


def random_cache(machine: Machine, num_slots: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = num_slots, context, SPEC.num_kv_heads, SPEC.key_dim
    keys, values = (torch.empty(shape, dtype=machine.dtype, device=machine.device).normal_() for _ in "kv")
    return keys, values


def views(keys: torch.Tensor, values: torch.Tensor) -> Iterator[tuple[str, CacheView]]:
    """The same memory as slots and as blocks in random order."""
    yield "", LayerView(keys, values)
    num_slots, context = keys.shape[:2]
    for size in BLOCK_SIZES:
        in_blocks = -1, size, *keys.shape[2:]
        order = torch.randperm(num_slots * context // size, device=keys.device).to(torch.int32)
        tables = order.view(num_slots, context // size)
        yield f" of {size}", PagedLayerView(keys.view(in_blocks), values.view(in_blocks), tables)


def able(view: CacheView, left_out: tuple[str, ...]) -> Iterator[str]:
    """Kernels that compute such a layer over such a view."""
    for name, kernel in KERNELS.items():
        reads = isinstance(view, kernel.reads) and kernel.unsupported(SPEC, view) is None
        if reads and name not in left_out:
            yield name


def compared(times: Mapping[str, float]) -> tuple[str, str] | None:
    """The fastest over slots, and the fastest over blocks of any size, if there are both."""
    slots = [name for name in times if " of " not in name]
    blocks = [name for name in times if " of " in name]
    return (min(slots, key=times.__getitem__), min(blocks, key=times.__getitem__)) if slots and blocks else None


def _case(machine: Machine, num_seqs: int, context: int) -> Iterator[dict[str, object]]:
    nbytes = num_seqs * context * token_nbytes(machine)
    if nbytes > machine.free_nbytes * 0.6:
        return
    copies = 1 if machine.tiny else max(1, min(MOST_COPIES, GRAPH_COPIES_NBYTES // nbytes))
    keys, values = random_cache(machine, copies * num_seqs, context)
    query = torch.randn(num_seqs, SPEC.num_heads, SPEC.key_dim, dtype=machine.dtype, device=machine.device)
    times: dict[str, float] = {}
    fixed: dict[str, float] = {}
    failed: dict[str, str] = {}
    for label, view in views(keys, values):
        for name in able(view, (NEVER, COPIES) if num_seqs <= 8 else (NEVER, COPIES, *SLOW)):
            try:
                times[f"{name}{label}"] = _time(machine, name, view, query, copies)
                if isinstance(view, LayerView) and KERNELS[name].uncapturable is None:
                    fixed[name] = _time(machine, name, view, query, copies, _any_length)
            except Exception as error:  # one kernel's trouble is a finding, and the others are to be measured
                failed[f"{name}{label}"] = repr(error)
                # At once: where the device is broken, all that follows fails, and this table with it.
                print(f"{name}{label}, batch {num_seqs}, context {context}: {error!r}", flush=True)
    best = compared(times)
    if best is None:
        return
    slot, block = best
    yield {
        "batch": num_seqs,
        "context": context,
        "slots": slot,
        "slots, µs": times[slot] * 1e6,
        "GB/s": nbytes / times[slot] / 1e9,
        "of copy": nbytes / times[slot] / machine.copy_nbytes_per_s,
        "in graphs, µs": fixed[slot] * 1e6 if slot in fixed else None,
        "blocks": block,
        "blocks, µs": times[block] * 1e6,
        "slots ÷ blocks": times[block] / times[slot],
        "times, µs": {name: s * 1e6 for name, s in times.items()},
        "times in graphs, µs": {name: s * 1e6 for name, s in fixed.items()},
        "failed": failed,
    }


def _any_length(batch: RaggedBatch, longest: int) -> RaggedBatch:
    """The same batch as decode graphs have it: sequences may be longer, as long as one graph serves."""
    bound = next(bound for bound in key_bounds(max(CONTEXTS)) if bound >= longest)
    return fixed_batch(batch.slots, batch.positions, bound, {None})


def _time(
    machine: Machine,
    name: str,
    view: CacheView,
    query: torch.Tensor,
    copies: int,
    change: Callable[[RaggedBatch, int], RaggedBatch] = lambda batch, _: batch,
) -> float:
    num_seqs, last = len(query), context_of(view) - 1
    kernel: AttentionKernel[CacheView] = KERNELS[name]
    batches = [
        RaggedBatch.of([Chunk(copy * num_seqs + i, last, [0], 0) for i in range(num_seqs)], machine.device)
        for copy in range(copies)
    ]

    def call(batch: RaggedBatch) -> torch.Tensor:
        return kernel(query, view, batch, SPEC, None)

    batches = [change(batch, last + 1) for batch in batches]
    with torch.inference_mode():
        return machine.seconds_each([partial(call, batch) for batch in batches])


def context_of(view: CacheView) -> int:
    return view.tables.shape[1] * view.block_size if isinstance(view, PagedLayerView) else view.keys.shape[1]
