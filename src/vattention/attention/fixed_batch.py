"""A decode step whose sequences only the device knows, so that it can be captured once and replayed for others.

Slots and positions are tensors of fixed address, and what kernels take besides is computed from them on the device.
On the host every sequence is as long as any may become: what is decided there (parts to cut keys into, columns of a
table) suits the longest, and holds for shorter ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from vattention.attention.kernel import RaggedBatch, Span
from vattention.attention.sequences import Sequences, sequences

NO_SLOT = -1
"""Stands where the host does not know a sequence's slot."""


def fixed_batch(
    slots: torch.Tensor, positions: torch.Tensor, most_keys: int, windows: Iterable[int | None]
) -> RaggedBatch:
    """A batch of B sequences that bring one token each.

    Args:
        slots, positions: [B] int64; positions are less than `most_keys`.
        most_keys: tokens that the longest may have, this step's among them.
        windows: of the layers.
    """
    spans: tuple[Span, ...] = tuple((NO_SLOT, row, 1, most_keys - 1) for row in range(len(slots)))
    batch = RaggedBatch.on_device(slots, positions, spans)
    for window in windows:
        sequences(batch, window, partial(_on_device, batch, window))
    return batch


def _on_device(batch: RaggedBatch, window: int | None) -> tuple[Sequences]:
    count, device = len(batch.slots), batch.slots.device
    last = batch.spans[0][3]
    ends = batch.positions + 1
    begins = torch.zeros_like(ends) if window is None else (ends - window).clamp(min=0)
    numbers = torch.zeros(5, count + 1, dtype=torch.int32, device=device)
    for row, values in zip((0, 1, 2, 4), (batch.slots, begins, ends, ends - begins), strict=True):
        numbers[row, :-1] = values
    numbers[3] = torch.arange(count + 1, dtype=torch.int32, device=device)
    begin = 0 if window is None else max(0, last - window + 1)
    return (Sequences(batch.spans, slice(0, count), window, (begin,) * count, numbers),)
