"""The contract of an attention kernel over the contiguous cache.

A kernel sees queries of a ragged batch in one tensor and each layer's keys and values as plain strided tensors; who
owns the memory behind them it cannot know. What it cannot compute it says beforehand (`unsupported`), so that
another kernel is chosen: a feature is never dropped silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vattention.core import AttentionSpec, Chunk
from vattention.kv.manager import LayerView


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """The shape of one forward pass: sequences of different lengths, flattened to one row of T tokens.

    Attributes:
        slots: [T] int64, the slot of each token.
        positions: [T] int64, the position of each token in its sequence.
        spans: per sequence (slot, first row, number of rows, start): its tokens are rows [first, first + number)
            of the batch, at positions [start, start + number); its cache holds tokens [0, start + number) by the
            time attention runs.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    spans: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def of(cls, chunks: Sequence[Chunk], device: torch.device | str = "cpu") -> RaggedBatch:
        slots: list[int] = []
        positions: list[int] = []
        spans = []
        for chunk in chunks:
            count = len(chunk.token_ids)
            spans.append((chunk.slot, len(slots), count, chunk.start))
            slots.extend([chunk.slot] * count)
            positions.extend(range(chunk.start, chunk.end))
        return cls(
            torch.tensor(slots, dtype=torch.int64, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
            tuple(spans),
        )


class AttentionKernel(Protocol):
    """Causal attention of a ragged batch over cached keys and values."""

    @property
    def name(self) -> str: ...

    def unsupported(self, spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot compute such a layer, or None if it can."""
        ...

    def __call__(
        self,
        query: torch.Tensor,
        view: LayerView,
        batch: RaggedBatch,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [T, num_heads, key_dim].
            view: the layer's cache, with this batch's keys and values already written.
            sinks: [num_heads] logits where `spec.has_sinks`, else None.

        Returns:
            [T, num_heads, value_dim], in the query's dtype.
        """
        ...
