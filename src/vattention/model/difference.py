"""How far a replacement's results are from those of the module it replaces."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 1e-5}
"""Largest difference from the replaced module's result, as a share of the largest number in the same row of it.

Two units in the last place of bfloat16 and float16; in float32 what another order of summation makes.
"""


def largest_difference(
    replacement: Callable[[Tensor], Tensor],
    original: Callable[[Tensor], Tensor],
    num_in: int,
    dtype: torch.dtype,
    rows: tuple[int, ...] = (1, 5, 64),
) -> float:
    """Compares results for random inputs [rows, num_in]: the largest difference as a share of the largest number in
    its row; inf for NaN.

    Rows are scaled down to a thousandth from first to last: only small inputs show a norm's epsilon.
    """
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for count in rows:
        x = torch.randn(count, num_in, generator=generator) * torch.logspace(0, -3, count)[:, None]
        largest = max(largest, row_difference(replacement(x.to(dtype)), original(x.to(dtype))))
    return largest


def row_difference(result: Tensor, expected: Tensor) -> float:
    """The largest difference of [rows, width] as a share of the largest number in its row; inf for NaN."""
    expected = expected.float()
    scale = expected.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((result.float() - expected).abs() / scale).nan_to_num(math.inf).max())
