"""One draw from one row of logits: cut the distribution to what the parameters leave, then sample by Gumbel noise.

A vocabulary may have 262,144 tokens, so the common case sorts only a fraction of it: the maxima of a few hundred
blocks of logits yield a threshold above which at least as many tokens lie as are wanted. On a CPU, NumPy's
vectorised passes over a row do all this several times faster than torch's `topk`, `sort` and `multinomial`.

A cut depends on the row's values alone, with ties going to the smaller token id: how candidates were found cannot
change a sample.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from vattention.model.gumbel import likeliest
from vattention.native import Noise
from vattention.sampling_params import SamplingParams

Row = NDArray[np.float32]
"""Logits, or weights, of one sequence's next token."""

Ids = NDArray[np.intp]

BLOCK = 512
"""Numbers that the first, coarse pass over a row sees as one."""

FIRST_CANDIDATES = 64
"""Tokens that the first try at a nucleus asks for."""


def top(row: Row, count: int) -> Ids:
    """Ids of the `count` largest logits, largest first, the smaller id first among equals."""
    candidates = _candidates(row, count)
    return candidates[_descending(row[candidates])[:count]]


def draw(row: Row, largest: float, params: SamplingParams, noise: Noise | None) -> int:
    """Sample a token id.

    Args:
        row: [V] logits; -inf for impossible tokens.
        largest: the largest of them, finite.
        params: `temperature` above 0; then `min_p`, `top_k` and `top_p` cut, in this order.
        noise: [1], the row's.
    """
    with np.errstate(over="ignore"):  # logits masked with the dtype's minimum; their weight is 0 all the same
        kept = _kept(row, largest, params)
    if kept is not None:
        cut = np.full_like(row, -np.inf)
        cut[kept] = row[kept]
        row = cut
    token_ids, _ = likeliest(torch.from_numpy(row)[None], noise)
    return int(token_ids[0])


def _kept(row: Row, largest: float, params: SamplingParams) -> Ids | None:
    """Ids of the tokens that min_p, top_k and top_p leave, in ascending order; None for all."""
    all_in_reach = not 0 < params.top_k < len(row)
    if all_in_reach and params.min_p == 0.0:
        if params.top_p == 1.0:
            return None
        return _nucleus(row, _weights(row, largest, params.temperature), params.top_p)
    least = largest + params.temperature * math.log(params.min_p) if params.min_p > 0.0 else -math.inf
    if all_in_reach:
        kept = np.flatnonzero(row >= least)
    else:
        kept = top(row, params.top_k)
        kept = np.sort(kept[row[kept] >= least])
    if params.top_p < 1.0:
        logits = row[kept]
        kept = kept[_nucleus(logits, _weights(logits, largest, params.temperature), params.top_p)]
    return kept


def _nucleus(row: Row, weights: Row, top_p: float) -> Ids:
    """The smallest set of likeliest tokens whose share is at least `top_p`; indices in ascending order.

    Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020), section 3.1.
    """
    wanted = top_p * _block_sums(weights).sum()
    count = FIRST_CANDIDATES
    while count * BLOCK <= len(row):
        candidates = _candidates(row, count)
        order = candidates[_descending(row[candidates])]
        sums = np.cumsum(weights[order], dtype=np.float64)
        if sums[-1] >= wanted:
            return np.sort(order[: np.searchsorted(sums, wanted) + 1])
        count *= 4
    # Sorting the values without their ids takes a fraction of the time that sorting both does.
    sums = np.cumsum(np.sort(weights)[::-1], dtype=np.float64)
    return _first(row, min(int(np.searchsorted(sums, wanted)) + 1, len(row)))


def _first(row: Row, count: int) -> Ids:
    """Indices of the `count` largest values in ascending order; of equals, the first ones."""
    least = np.partition(row, len(row) - count)[len(row) - count]
    above = np.flatnonzero(row > least)
    equal = np.flatnonzero(row == least)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]), kind="stable")  # which merges what is in order already


def _candidates(row: Row, count: int) -> Ids:
    """Indices, in ascending order, of all values from some threshold on: at least the `count` largest."""
    if count >= len(row):
        return np.arange(len(row))
    maxima = np.maximum.reduceat(row, np.arange(0, len(row), BLOCK))
    values = maxima if count <= len(maxima) else row
    return np.flatnonzero(row >= np.partition(values, len(values) - count)[len(values) - count])


def _descending(values: Row) -> Ids:
    return np.argsort(-values, kind="stable")


def _weights(logits: Row, largest: float, temperature: float) -> Row:
    """Probabilities up to a common factor: the likeliest token has 1."""
    weights = logits - np.float32(largest)
    weights *= np.float32(1.0 / temperature)
    np.exp(weights, out=weights)
    return weights


def _block_sums(weights: Row) -> NDArray[np.float64]:
    return np.add.reduceat(weights, np.arange(0, len(weights), BLOCK)).astype(np.float64)
