"""What a request's parameters change in its logits before a token is chosen. Touches few numbers of a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vattention.model.draw import Row
from vattention.sampling_params import SamplingParams


def needs_adjustment(params: SamplingParams, num_output_tokens: int) -> bool:
    """Whether `adjust` would change anything."""
    return bool(
        num_output_tokens < params.min_tokens
        or params.logit_bias
        or params.allowed_token_ids
        or params.bad_words
        or params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def adjust(
    row: Row,
    params: SamplingParams,
    prompt_token_ids: Sequence[int],
    output_token_ids: Sequence[int],
    end_token_ids: frozenset[int],
    bad_words: Sequence[Sequence[int]] = (),
) -> None:
    """Apply allowed_token_ids, bad_words, min_tokens, logit_bias and the repetition, presence and frequency
    penalties, in this order, in place.

    Args:
        row: [V] logits.
        bad_words: as tokens; of each the last is impossible behind the others.
        end_token_ids: impossible, together with `params.stop_token_ids`, before `params.min_tokens`.

    The repetition penalty is that of Keskar et al., "CTRL" (2019), section 4.1, on tokens of prompt and output.
    """
    if params.allowed_token_ids:
        allowed = list(params.allowed_token_ids)
        kept = row[allowed]
        row[:] = -np.inf
        row[allowed] = kept
    for *before, last in bad_words:
        if not before or list(output_token_ids[-len(before) :]) == before:
            row[last] = -np.inf
    if len(output_token_ids) < params.min_tokens:
        row[[*end_token_ids, *params.stop_token_ids]] = -np.inf
    for token, bias in params.logit_bias.items():
        row[token] += bias
    if params.repetition_penalty != 1.0:
        seen = np.concatenate([_ids(prompt_token_ids), _ids(output_token_ids)])
        logits = row[seen]
        penalty = np.float32(params.repetition_penalty)
        row[seen] = np.where(logits > 0, logits / penalty, logits * penalty)
    if params.presence_penalty or params.frequency_penalty:
        tokens, counts = np.unique(_ids(output_token_ids), return_counts=True)
        row[tokens] -= (counts * params.frequency_penalty + params.presence_penalty).astype(np.float32)


def _ids(token_ids: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.fromiter(token_ids, np.int64, len(token_ids))
