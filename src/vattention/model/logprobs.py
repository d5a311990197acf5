"""Log-probabilities of tokens, from logits as the model gave them."""

from __future__ import annotations

import math

import numpy as np

from vattention.model.draw import Row, top
from vattention.outputs import Logprob, TokenLogprobs


def token_logprobs(row: Row, token_id: int, count: int) -> TokenLogprobs:
    """The given token's log-probability and those of the `count` likeliest tokens.

    Ranks count from 1; among equally likely tokens the smaller id comes first.

    Args:
        row: [V] logits.
    """
    largest = float(row.max())
    with np.errstate(over="ignore"):  # logits masked with the dtype's minimum
        log_total = largest + math.log(np.exp(row - np.float32(largest)).sum(dtype=np.float64))
    chosen = row[token_id]
    rank = 1 + int(np.count_nonzero(row > chosen)) + int(np.count_nonzero(row[:token_id] == chosen))
    report = {token_id: Logprob(float(chosen) - log_total, rank)}
    for place, token in enumerate(top(row, count).tolist() if count else (), start=1):
        report.setdefault(token, Logprob(float(row[token]) - log_total, place))
    return report
