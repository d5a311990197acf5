"""Attention through torch's `scaled_dot_product_attention`, one call per sequence."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from vattention.attention.blocks import Block, blocks
from vattention.attention.kernel import RaggedBatch
from vattention.core import AttentionSpec
from vattention.kv.manager import LayerView

_MAX_MASK = 1 << 22
"""Most elements of one mask; torch turns it into numbers of the query's dtype, at most 16 MiB then."""


class SdpaKernel:
    """Torch's fused attention over each sequence's slice of the cache, which it reads in place.

    Grouped-query attention never repeats keys. In decoding, the query heads that share a key head are handed over
    as rows of one head, so that keys are read once for all of them (on a CPU in bfloat16 more than ten times as
    fast as torch's `enable_gqa`). In prefill, key heads are the batch dimension and the heads that share one are an
    expanded dimension of stride 0.
    """

    name = "sdpa"

    def unsupported(self, spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        if not dtype.is_floating_point:
            return f"keys and values of {dtype} are no floating-point numbers"
        if spec.softcap is not None:
            return "torch's scaled_dot_product_attention has no soft-cap on scores"
        if spec.has_sinks:
            return "torch's scaled_dot_product_attention has no attention sinks"
        return None

    def __call__(
        self,
        query: torch.Tensor,
        view: LayerView,
        batch: RaggedBatch,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        outputs = []
        for slot, first_row, num_rows, start in batch.spans:
            if num_rows == 1:
                first_key = 0 if spec.window is None else max(0, start - spec.window + 1)
                outputs.append(_decode(query[first_row], view, slot, first_key, start + 1, spec))
            else:
                for block in blocks(first_row, num_rows, start, spec.window, _MAX_MASK):
                    outputs.append(_prefill(query, view, slot, block, spec))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _decode(
    query: torch.Tensor, view: LayerView, slot: int, first_key: int, end_key: int, spec: AttentionSpec
) -> torch.Tensor:
    """One token, which sees all the keys it is given: [num_heads, key_dim] → [1, num_heads, value_dim]."""
    attended = scaled_dot_product_attention(
        query.view(1, spec.num_kv_heads, -1, spec.key_dim),
        view.keys[slot, first_key:end_key].transpose(0, 1).unsqueeze(0),
        view.values[slot, first_key:end_key].transpose(0, 1).unsqueeze(0),
        scale=spec.scale,
    )
    return attended.reshape(1, spec.num_heads, spec.value_dim)


def _prefill(query: torch.Tensor, view: LayerView, slot: int, block: Block, spec: AttentionSpec) -> torch.Tensor:
    """A block of rows: [num_rows, num_heads, value_dim]."""
    num_groups = spec.num_heads // spec.num_kv_heads
    rows = query[block.first_row : block.first_row + block.num_rows]
    keys = view.keys[slot, block.first_key : block.end_key].transpose(0, 1).unsqueeze(1)
    values = view.values[slot, block.first_key : block.end_key].transpose(0, 1).unsqueeze(1)
    is_causal = block.is_causal_square
    attended = scaled_dot_product_attention(
        rows.view(-1, spec.num_kv_heads, num_groups, spec.key_dim).permute(1, 2, 0, 3),
        keys.expand(-1, num_groups, -1, -1),
        values.expand(-1, num_groups, -1, -1),
        attn_mask=None if is_causal or block.sees_all else block.visible(query.device),
        is_causal=is_causal and not block.sees_all,
        scale=spec.scale,
    )
    return attended.permute(2, 0, 1, 3).reshape(block.num_rows, spec.num_heads, spec.value_dim)
