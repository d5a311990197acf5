"""Attention over blocks by way of a contiguous copy, for torch's kernels."""

from __future__ import annotations

import torch

from vattention.attention.eager import EagerKernel
from vattention.attention.kernel import AttentionKernel, RaggedBatch, Span
from vattention.attention.sdpa import SdpaKernel
from vattention.core import AttentionSpec
from vattention.kv.manager import LayerView, PagedLayerView


class GatheredKernel:
    """Copies each sequence's blocks side by side, and goes on as over contiguous slots: one sequence at a time.

    The copy is worth its price where many rows read it, which are prompts; otherwise it is what runs everywhere.
    """

    name = "gathered"
    reads = PagedLayerView
    uncapturable = "it computes sequence by sequence, by numbers on the host"

    def unsupported(self, spec: AttentionSpec, view: PagedLayerView) -> str | None:
        return EagerKernel().unsupported(spec, view)

    def __call__(
        self,
        query: torch.Tensor,
        view: PagedLayerView,
        batch: RaggedBatch,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        output = query.new_empty(query.shape[0], spec.num_heads, spec.value_dim)
        for span in batch.spans:
            attend_long(query, *gather(view, span, spec.window), spec, sinks, output)
        return output


def gather(view: PagedLayerView, span: Span, window: int | None) -> tuple[LayerView, Span]:
    """A contiguous copy of what the span reads, as slot 0, and the span that reads it there.

    A token's position in the copy differs from that in its sequence by whole blocks.
    """
    slot, first_row, num_rows, start = span
    size = view.block_size
    first = 0 if window is None else max(0, start - window + 1) // size
    blocks = view.tables[slot, first : -(-(start + num_rows) // size)]
    keys, values = (pool[blocks].flatten(0, 1).unsqueeze(0) for pool in (view.keys, view.values))
    return LayerView(keys, values), (0, first_row, num_rows, start - first * size)


def attend_long(
    query: torch.Tensor,
    view: LayerView,
    span: Span,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Compute one span's rows of `output` [T, num_heads, value_dim] by the faster of torch's ways that can."""
    slot, first_row, num_rows, start = span
    kernels: tuple[AttentionKernel[LayerView], ...] = SdpaKernel(), EagerKernel()
    able = next(k for k in kernels if k.unsupported(spec, view) is None)
    rows = slice(first_row, first_row + num_rows)
    alone = RaggedBatch(((slot, 0, num_rows, start),), query.device)
    output[rows] = able(query[rows], view, alone, spec, sinks)
