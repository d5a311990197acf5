"""Weights in panels of 32 outputs, as native/linear.c describes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vattention.native.huge import Empty

COLUMNS = 32
"""Outputs in a panel."""


def pack(weight: Tensor, empty: Empty) -> Tensor:
    """A weight [out, in] as linear.c takes it: [ceil(out / 32), in, 32] float32 numbers, or
    [ceil(out / 32), ceil(in / 2), 32, 2] of bfloat16.
    """
    num_out, num_in = weight.shape
    num_panels, width = math.ceil(num_out / COLUMNS), 4 // weight.itemsize
    num_steps = math.ceil(num_in / width)
    panels = empty(num_panels * num_steps * width * COLUMNS, weight.dtype)
    panels = panels.view(num_panels, num_steps, COLUMNS, width)
    whole = num_out // COLUMNS
    rest = F.pad(weight[whole * COLUMNS :], (0, 0, 0, -num_out % COLUMNS))
    for part, rows in ((panels[:whole], weight[: whole * COLUMNS]), (panels[whole:], rest)):
        if len(part):
            # A column's numbers of a step move as one.
            whole_steps = rows if num_steps * width == num_in else F.pad(rows, (0, 1))
            words = _as_words(whole_steps).view(-1, COLUMNS, num_steps)
            part.view(torch.int32).squeeze(3).copy_(words.transpose(1, 2))
    return panels


def unpack(panels: Tensor, num_out: int, num_in: int) -> Tensor:
    """The weight [num_out, num_in] that was packed."""
    rows = panels.transpose(1, 2).reshape(panels.shape[0] * COLUMNS, -1)
    return rows[:num_out, :num_in].contiguous()


def _as_words(rows: Tensor) -> Tensor:
    """Rows of an even number of bytes by four as int32, of the same memory where that begins at a word."""
    rows = rows.contiguous()
    return (rows.clone() if rows.storage_offset() * rows.itemsize % 4 else rows).view(torch.int32)
