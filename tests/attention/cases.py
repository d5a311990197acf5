"""Layers and batches that every kernel is tried on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from tests.attention.dense import DenseManager
from vattention.attention.kernel import RaggedBatch
from vattention.core import AttentionSpec, Chunk
from vattention.kv.manager import CacheView, LayerView, PagedLayerView

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
    "odd dims": AttentionSpec(14, 2, 37, 75, 0.16),
    "large dims": AttentionSpec(10, 2, 128, 256, 0.07),
    "wide": AttentionSpec(8, 2, 64, 64, 0.125),
    "wide, window": AttentionSpec(6, 2, 64, 64, 0.125, window=20),
    "wide, softcap": AttentionSpec(2, 2, 64, 64, 0.25, softcap=2.0),
    "groups": AttentionSpec(20, 1, 64, 96, 0.125),
    "groups, window": AttentionSpec(8, 1, 32, 128, 0.18, window=20),
    "groups, softcap": AttentionSpec(8, 2, 64, 64, 0.25, softcap=2.0),
}

BATCHES: dict[str, tuple[tuple[int, int], ...]] = {
    "one prompt": ((0, 9),),
    "one decode": ((12, 1),),
    "first token": ((0, 1),),
    "decodes": ((1, 1), (17, 1), (0, 1), (30, 1)),
    "chunk with history": ((11, 8),),
    "prompts": ((0, 3), (0, 21), (0, 1)),
    "mixed": ((5, 1), (0, 13), (9, 7), (30, 1), (1, 2)),
    "long decodes": ((127, 1), (299, 1), (128, 1), (3, 1)),
    "long chunks": ((120, 12), (250, 5)),
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

    most = max(start + count for start, count in lengths)
    kv = DenseManager([spec], num_slots=len(lengths) + 1, max_len=most + 5, dtype=dtype, device=device)
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


BLOCK_SIZES = (1, 3, 16, 256)


def in_blocks(view: LayerView, batch: RaggedBatch, spec: AttentionSpec, block_size: int) -> PagedLayerView:
    """The same cache in blocks that lie in no order, with a block of NaN where a table's entries mean nothing."""
    num_slots, max_len = view.keys.shape[:2]
    per_slot = -(-max_len // block_size)
    num_blocks = num_slots * per_slot + 1
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).to(torch.int32)

    def pool(tensor: torch.Tensor) -> torch.Tensor:
        padded = torch.full((num_slots, per_slot * block_size, *tensor.shape[2:]), torch.nan).to(tensor)
        padded[:, :max_len] = tensor
        blocks = torch.full((num_blocks, block_size, *tensor.shape[2:]), torch.nan).to(tensor)
        blocks[order[:-1].long().to(tensor.device)] = padded.view(num_blocks - 1, block_size, *tensor.shape[2:])
        return blocks

    tables = order[-1].repeat(num_slots, per_slot)
    for slot, _, num_rows, start in batch.spans:
        first = 0 if spec.window is None else max(0, start - spec.window + 1)
        used = slice(first // block_size, -(-(start + num_rows) // block_size))
        tables[slot, used] = order[:-1].view(num_slots, per_slot)[slot, used]
    return PagedLayerView(pool(view.keys), pool(view.values), tables.to(view.keys.device))


def views(
    kind: type[CacheView], view: LayerView, batch: RaggedBatch, spec: AttentionSpec, block_sizes: Collection[int]
) -> list[CacheView]:
    """The cache in all forms of one kind."""
    if kind is LayerView:
        return [view]
    return [in_blocks(view, batch, spec, block_size) for block_size in block_sizes]
