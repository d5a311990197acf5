"""The likeliest next tokens of beams: one pass over all their rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vattention.errors import VAttentionError
from vattention.model.draw import top
from vattention.model.logits import adjust
from vattention.model.sampler import SampledToken, SampleRow, logits_error
from vattention.outputs import Logprob, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Proposals:
    """What one beam may go on with, likeliest first, the smaller id first among equally likely tokens.

    Attributes:
        token_ids: [count] int64.
        logprobs: [count] float64, natural logarithms; -inf for impossible tokens.
        error: why there are none.
    """

    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    error: VAttentionError | None = None

    def choose(self, place: int, num_logprobs: int | None) -> SampledToken:
        """The proposal at `place` as the chosen token, with the likeliest ones to report; None for no report."""
        token_id, logprob = int(self.token_ids[place]), float(self.logprobs[place])
        report: TokenLogprobs = {}
        if num_logprobs is not None:
            report[token_id] = Logprob(logprob, place + 1)
            for i, other in enumerate(self.token_ids[:num_logprobs].tolist()):
                report.setdefault(other, Logprob(float(self.logprobs[i]), i + 1))
        return SampledToken(token_id, logprob, report)


def propose(logits: torch.Tensor, rows: Sequence[SampleRow], counts: Sequence[int]) -> list[Proposals]:
    """The `counts[i]` likeliest tokens of each row, or all there are; one row's bad logits are its error alone.

    Probabilities are those after min_tokens, logit_bias and penalties: a search for likely sequences has to rank by
    what it forbids and favours.

    Args:
        logits: [R, V] float32, unchanged by this call.
        rows: R of them.
    """
    if not rows:
        return []
    logits = _adjusted(logits, rows)
    count = min(max(counts), logits.shape[1])
    token_ids, logprobs, largest = _likeliest(logits, count)
    return [
        Proposals(token_ids[i, :wanted], logprobs[i, :wanted], logits_error(float(largest[i])))
        for i, wanted in enumerate(counts)
    ]


def _adjusted(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    changed = [i for i, row in enumerate(rows) if row.is_adjusted]
    if changed:
        logits = logits.clone()
    for i in changed:
        own = logits[i].cpu().numpy()
        row = rows[i]
        adjust(own, row.params, row.prompt_token_ids, row.output_token_ids, row.end_token_ids, row.bad_words)
        logits[i] = torch.from_numpy(own)
    return logits


def _likeliest(
    logits: torch.Tensor, count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float32]]:
    """Ids and log-probabilities of each row's `count` likeliest tokens, and its largest logit."""
    # One more than wanted shows whether equals lie on both sides of the cut, where topk takes any of them.
    found, found_ids = logits.topk(min(count + 1, logits.shape[1]), dim=-1)
    values, ids = found.cpu().numpy(), found_ids.cpu().numpy()
    for row in np.flatnonzero(values[:, count - 1] == values[:, -1]) if values.shape[1] > count else ():
        own = logits[row].cpu().numpy()
        ids[row, :count] = top(own, count)
        values[row, :count] = own[ids[row, :count]]
    ids, values = ids[:, :count], values[:, :count]
    order = np.lexsort((ids, -values), axis=-1)
    ids = np.take_along_axis(ids, order, axis=-1)
    logprobs = torch.log_softmax(logits, dim=-1).gather(-1, torch.from_numpy(ids).to(logits.device))
    return ids, logprobs.double().cpu().numpy(), values.max(axis=-1)
