"""Attention of one layer over contiguous slots and over blocks, by every kernel that runs here: prompts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.kernels import NEVER, SLOW, SPEC, able, compared, random_cache, token_nbytes, views
from benchmarks.gpu.machine import Chart, Machine, Table
from vattention.attention.kernel import RaggedBatch
from vattention.attention.registry import KERNELS
from vattention.core import Chunk

CASES = (
    *((1, 1024, 1024), (8, 1024, 1024), (64, 1024, 1024), (1, 8192, 8192), (8, 8192, 8192)),
    *((1, 32768, 32768), (1, 2048, 32768), (1, 196608, 196608), (1, 2048, 196608)),
)
"""Sequences, rows that each brings, and its tokens with them."""
LONG_FLOPS = 1e14
"""So many take a good part of a second."""
MOST_SCORES = 1 << 25
"""Of a sequence, for kernels that go through torch's stock one: it gets some millions at a time, and cuDNN, which
torch asks first on some GPUs, plans anew for each number of keys.
"""


def prompts(machine: Machine) -> Table:
    """Whole prompts, and chunks behind many tokens."""
    cases = ((1, 32, 256), (2, 256, 256)) if machine.tiny else CASES
    return Table(
        "Attention over prompts, one layer of Llama 3 8B: slots at least as fast as blocks, 1.2 times in the paper",
        [row for case in cases for row in _case(machine, *case)],
        Chart("context", "slots ÷ blocks", ("batch", "rows"), 1.0),
    )


def _case(machine: Machine, num_seqs: int, num_rows: int, context: int) -> Iterator[dict[str, object]]:
    if num_seqs * context * token_nbytes(machine) > machine.free_nbytes * 0.3:
        return
    start = context - num_rows
    # Two products of two operations for each row, key and number.
    num_pairs = num_seqs * (num_rows * start + num_rows * (num_rows + 1) // 2)
    flops = 2 * num_pairs * SPEC.num_heads * (SPEC.key_dim + SPEC.value_dim)
    keys, values = random_cache(machine, num_seqs, context)
    total = num_seqs * num_rows
    query = torch.randn(total, SPEC.num_heads, SPEC.key_dim, dtype=machine.dtype, device=machine.device)
    chunks = [Chunk(slot, start, [0] * num_rows, 0) for slot in range(num_seqs)]
    left_out = (NEVER, *SLOW) if num_rows * context > MOST_SCORES else (NEVER,)
    times: dict[str, float] = {}
    failed: dict[str, str] = {}
    for label, view in views(keys, values):
        for name in able(view, left_out):

            def call(name: str = name, view: object = view) -> torch.Tensor:
                output: torch.Tensor = KERNELS[name](
                    query, view, RaggedBatch.of(chunks, machine.device), SPEC, None
                )
                return output

            try:
                with torch.inference_mode():
                    times[f"{name}{label}"] = machine.seconds(call, 1 if flops > LONG_FLOPS else 5)
            except Exception as error:  # one kernel's trouble is a finding, and the others are to be measured
                failed[f"{name}{label}"] = repr(error)
                print(f"{name}{label}, {num_seqs} x {num_rows} of {context}: {error!r}", flush=True)
    best = compared(times)
    if best is None:
        return
    slot, block = best
    yield {
        "batch": num_seqs,
        "rows": num_rows,
        "context": context,
        "slots": slot,
        "slots, ms": times[slot] * 1e3,
        "TFLOP/s": flops / times[slot] / 1e12,
        "of product": flops / times[slot] / machine.matrix_flops_per_s,
        "blocks": block,
        "blocks, ms": times[block] * 1e3,
        "slots ÷ blocks": times[block] / times[slot],
        "times, ms": {name: s * 1e3 for name, s in times.items()},
        "failed": failed,
    }
