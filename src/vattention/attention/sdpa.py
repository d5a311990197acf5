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
    reads = LayerView
    uncapturable = "it computes sequence by sequence, by numbers on the host"

    def unsupported(self, spec: AttentionSpec, view: LayerView) -> str | None:
        if not view.keys.dtype.is_floating_point:
            return f"keys and values of {view.keys.dtype} are no floating-point numbers"
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
        rows = query.view(-1, spec.num_kv_heads, spec.num_heads // spec.num_kv_heads, spec.key_dim)
        # [num_slots, kv heads, max_len, dim]: once, not per sequence, which took a quarter of a small decode.
        keys, values = view.keys.transpose(1, 2), view.values.transpose(1, 2)
        outputs = []
        for slot, first_row, num_rows, start in batch.spans:
            if num_rows == 1:
                first_key = 0 if spec.window is None else max(0, start - spec.window + 1)
                outputs.append(
                    scaled_dot_product_attention(
                        rows[first_row : first_row + 1],
                        keys[slot : slot + 1, :, first_key : start + 1],
                        values[slot : slot + 1, :, first_key : start + 1],
                        scale=spec.scale,
                    )
                )
            else:
                for block in blocks(first_row, num_rows, start, spec.window, _MAX_MASK):
                    outputs.append(_prefill(rows, keys[slot], values[slot], block, spec.scale))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output.reshape(-1, spec.num_heads, spec.value_dim)


def _prefill(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, block: Block, scale: float
) -> torch.Tensor:
    """[num_rows, kv heads, groups, value_dim] of a block, from [kv heads, max_len, dim] keys and values."""
    num_groups = rows.shape[2]
    span = slice(block.first_key, block.end_key)
    is_causal = block.is_causal_square and not block.sees_all
    attended = scaled_dot_product_attention(
        rows[block.first_row : block.first_row + block.num_rows].permute(1, 2, 0, 3),
        keys[:, span].unsqueeze(1).expand(-1, num_groups, -1, -1),
        values[:, span].unsqueeze(1).expand(-1, num_groups, -1, -1),
        attn_mask=None if is_causal or block.sees_all else block.mask(rows.device, rows.dtype),
        is_causal=is_causal,
        scale=scale,
    )
    return attended.permute(2, 0, 1, 3)
