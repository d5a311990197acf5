"""What min_p, top_k and top_p leave of many rows of logits at once, where they are: on a GPU one sort of all rows
costs less than bringing one of them to the host. `draw.py` is the same for one row on a processor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vattention.sampling_params import SamplingParams

_NUMBERS_AT_A_TIME = 1 << 22
"""Sorting takes some 50 bytes for each."""


def cut(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """A copy with -inf for the tokens that the parameters rule out, of equals those with the larger ids first.

    Args:
        logits: float32 [R, V]; -inf for impossible tokens. A row with a NaN stays of no use.
        params: of each row, `temperature` above 0; `min_p`, `top_k` and `top_p` cut, in this order.
    """
    num_rows = max(1, _NUMBERS_AT_A_TIME // logits.shape[1])
    result = torch.full_like(logits, -math.inf)
    for begin in range(0, len(logits), num_rows):
        rows = slice(begin, begin + num_rows)
        _cut(logits[rows], params[rows], result[rows])
    return result


def _cut(logits: Tensor, params: Sequence[SamplingParams], result: Tensor) -> None:
    """Puts the logits that are left into a `result` of -inf."""
    width = logits.shape[1]
    # In float64, weights are exact enough for all temperatures, and sums for all vocabularies.
    columns = torch.tensor([_numbers(one, width) for one in params], dtype=torch.float64).to(logits.device)
    temperatures, reach, top_k, top_p = columns.T.unsqueeze(2)
    values, token_ids = logits.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(width, device=logits.device)
    largest = values[:, :1]
    kept = (ranks < top_k) & (values >= (largest + reach).float())
    weights = torch.exp((values - largest) / temperatures).where(kept, 0.0)
    sums = weights.cumsum(dim=-1)
    # The first tokens whose share is at least top_p: those before which less has come.
    kept &= (top_p == 1.0) | (sums - weights < top_p * sums[:, -1:])
    result.scatter_(1, token_ids, values.where(kept, -math.inf))


def _numbers(params: SamplingParams, width: int) -> tuple[float, float, float, float]:
    """Temperature, how far below the largest logit min_p reaches, top_k and top_p."""
    reach = params.temperature * math.log(params.min_p) if params.min_p > 0.0 else -math.inf
    top_k = params.top_k if 0 < params.top_k < width else width
    return params.temperature, reach, top_k, params.top_p
