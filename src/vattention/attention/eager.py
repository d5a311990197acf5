"""Attention in plain torch maths: every feature, at the price of speed and of memory for the scores."""

from __future__ import annotations

import torch

from vattention.attention.blocks import blocks
from vattention.attention.kernel import RaggedBatch
from vattention.core import AttentionSpec
from vattention.kv.manager import CacheView, LayerView

_MAX_SCORES = 1 << 24
"""Most scores at a time, over all heads: 64 MiB in float32."""


class EagerKernel:
    """Computes everything that `AttentionSpec` can say, in float32 or better whatever the inputs are."""

    name = "eager"
    reads = LayerView
    uncapturable = "it computes sequence by sequence, by numbers on the host"

    def unsupported(self, spec: AttentionSpec, view: CacheView) -> str | None:
        dtype = view.keys.dtype
        return None if dtype.is_floating_point else f"keys and values of {dtype} are no floating-point numbers"

    def __call__(
        self,
        query: torch.Tensor,
        view: LayerView,
        batch: RaggedBatch,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        output = query.new_empty(query.shape[0], spec.num_heads, spec.value_dim)
        precise = torch.promote_types(query.dtype, torch.float32)
        num_groups = spec.num_heads // spec.num_kv_heads
        sink = None if sinks is None else sinks.to(precise).view(spec.num_kv_heads, num_groups, 1, 1)
        for slot, first_row, num_rows, start in batch.spans:
            for block in blocks(first_row, num_rows, start, spec.window, _MAX_SCORES // spec.num_heads):
                rows = slice(block.first_row, block.first_row + block.num_rows)
                span = slice(block.first_key, block.end_key)
                # [kv heads, groups, rows, dim] against [kv heads, 1, keys, dim]
                q = query[rows].to(precise).reshape(-1, spec.num_kv_heads, num_groups, spec.key_dim)
                k = view.keys[slot, span].to(precise).permute(1, 0, 2).unsqueeze(1)
                v = view.values[slot, span].to(precise).permute(1, 0, 2).unsqueeze(1)
                scores = (q.permute(1, 2, 0, 3) * spec.scale) @ k.transpose(-1, -2)
                if spec.softcap is not None:
                    scores = spec.softcap * torch.tanh(scores / spec.softcap)
                if not block.sees_all:
                    scores = scores.masked_fill(~block.visible(query.device), float("-inf"))
                if sink is not None:
                    scores = torch.cat([scores, sink.expand(-1, -1, block.num_rows, 1)], dim=-1)
                weights = torch.softmax(scores, dim=-1)[..., : block.num_keys]
                output[rows] = (weights @ v).permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
        return output
