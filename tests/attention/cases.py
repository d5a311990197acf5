"""Layers and batches that every kernel is tried on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.attention.dense import DenseManager
from vattention.attention.kernel import RaggedBatch
from vattention.core import AttentionSpec, Chunk
from vattention.kv.manager import LayerView

SPECS = {
    "mha": AttentionSpec(4, 4, 16, 16, 0.25),
    "gqa": AttentionSpec(6, 2, 16, 16, 0.25),
    "mqa": AttentionSpec(4, 1, 16, 16, 0.25),
    "own scale": AttentionSpec(4, 2, 16, 16, 0.6),
    "window": AttentionSpec(4, 2, 16, 16, 0.25, window=5),
    "window of one": AttentionSpec(4, 2, 16, 16, 0.25, window=1),
    "value_dim": AttentionSpec(4, 2, 24, 16, 0.25),
    "value_dim and window": AttentionSpec(4, 4, 16, 24, 0.25, window=7),
    "softcap": AttentionSpec(4, 2, 16, 16, 0.5, softcap=2.0),
    "softcap and window": AttentionSpec(4, 2, 16, 16, 0.5, window=6, softcap=2.0),
    "sinks": AttentionSpec(4, 2, 16, 16, 0.25, has_sinks=True),
    "sinks and window": AttentionSpec(4, 2, 16, 16, 0.25, window=6, has_sinks=True),
}

BATCHES: dict[str, tuple[tuple[int, int], ...]] = {
    "one prompt": ((0, 9),),
    "one decode": ((12, 1),),
    "first token": ((0, 1),),
    "decodes": ((1, 1), (17, 1), (0, 1), (30, 1)),
    "chunk with history": ((11, 8),),
    "prompts": ((0, 3), (0, 21), (0, 1)),
    "mixed": ((5, 1), (0, 13), (9, 7), (30, 1), (1, 2)),
}
"""Per sequence (start, number of tokens)."""


def filled(
    spec: AttentionSpec,
    lengths: Sequence[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, LayerView, RaggedBatch, torch.Tensor | None]:
    """Arguments of a kernel call: a cache that holds what the batch may read, and NaN everywhere else.

    Slots are given out backwards and one is left over, so that a slot is never a row's index.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    kv = DenseManager([spec], num_slots=len(lengths) + 1, max_len=40, dtype=dtype, device=device)
    chunks = [Chunk(len(lengths) - i, start, [0] * count, 0) for i, (start, count) in enumerate(lengths)]
    view = kv.layer(0)
    for chunk in chunks:
        first = 0 if spec.window is None else max(0, chunk.start - spec.window + 1)
        view.keys[chunk.slot, first : chunk.end] = normal(chunk.end - first, spec.num_kv_heads, spec.key_dim)
        view.values[chunk.slot, first : chunk.end] = normal(chunk.end - first, spec.num_kv_heads, spec.value_dim)
    batch = RaggedBatch.of(chunks, device)
    # As models hand them over: a view of [num_heads, T, key_dim].
    query = normal(spec.num_heads, len(batch.slots), spec.key_dim).transpose(0, 1)
    return query, view, batch, normal(spec.num_heads) if spec.has_sinks else None
