"""Attention by its definition, one query and one head at a time, in float64."""

from __future__ import annotations

import math

import numpy as np
import torch

from vattention.attention.kernel import RaggedBatch
from vattention.core import AttentionSpec
from vattention.kv.manager import LayerView


def attend(
    query: torch.Tensor,
    view: LayerView,
    batch: RaggedBatch,
    spec: AttentionSpec,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, num_heads, value_dim] float64."""
    queries = query.double().cpu().numpy()
    keys, values = view.keys.double().cpu().numpy(), view.values.double().cpu().numpy()
    output = np.zeros((len(queries), spec.num_heads, spec.value_dim))
    for row, (slot, position) in enumerate(zip(batch.slots.tolist(), batch.positions.tolist(), strict=True)):
        seen = slice(0 if spec.window is None else max(0, position - spec.window + 1), position + 1)
        for head in range(spec.num_heads):
            kv_head = head * spec.num_kv_heads // spec.num_heads
            scores = keys[slot, seen, kv_head] @ queries[row, head] * spec.scale
            if spec.softcap is not None:
                scores = spec.softcap * np.tanh(scores / spec.softcap)
            weights = np.exp(scores)
            total = weights.sum()
            if sinks is not None:
                total += math.exp(float(sinks[head]))
            output[row, head] = weights / total @ values[slot, seen, kv_head]
    return torch.from_numpy(output)
