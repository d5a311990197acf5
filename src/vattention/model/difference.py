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
    like: Tensor,
    rows: tuple[int, ...] = (1, 5, 64),
) -> float:
    """Compares results for random inputs [rows, in]: the largest difference as a share of the largest number in its
    row; inf for NaN.

    Rows are scaled down to a thousandth from first to last: only small inputs show a norm's epsilon. In float16 it
    is a tenth: products of smaller numbers have fewer digits there.

    Args:
        like: a weight [..., in]; inputs are of its type and where it is.
    """
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    least = -1 if like.dtype == torch.float16 else -3
    for count in rows:
        x = torch.randn(count, like.shape[-1], generator=generator) * torch.logspace(0, least, count)[:, None]
        x = x.to(like)
        largest = max(largest, row_difference(replacement(x), original(x)))
    return largest


def row_difference(result: Tensor, expected: Tensor) -> float:
    """The largest difference of [rows, width] as a share of the largest number in its row; inf for NaN."""
    expected = expected.float()
    scale = expected.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((result.float() - expected).abs() / scale).nan_to_num(math.inf).max())
