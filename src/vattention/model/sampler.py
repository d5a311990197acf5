"""The next token of each sequence of a batch.

Sampling keeps no state: a draw is determined by the sequence's seed, the number of its tokens and its own logits,
so neither the rest of the batch nor preemption can change a sample. The order is vLLM's: logprobs from the logits
as they come, then allowed_token_ids, bad_words, min_tokens, logit_bias, penalties, the grammar, temperature, min_p,
top_k, top_p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from vattention.errors import RequestError, VAttentionError
from vattention.model.cut import cut
from vattention.model.draw import Row, draw
from vattention.model.grammar import GrammarMask
from vattention.model.gumbel import noise_for
from vattention.model.logits import adjust, needs_adjustment
from vattention.model.logprobs import token_logprobs
from vattention.model.predictions import GivenLogits, Predictions
from vattention.outputs import TokenLogprobs
from vattention.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What the choice of one sequence's next token depends on, besides its logits.

    Attributes:
        seed: the sequence's own; an integer of any size.
        prompt_token_ids, output_token_ids: its tokens so far; these may grow.
        end_token_ids: the model's end tokens, impossible before `params.min_tokens`.
        bad_words: those of the parameters, as tokens.
        mask: what its grammar allows; None without a grammar.
    """

    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    end_token_ids: frozenset[int]
    mask: GrammarMask | None = None
    bad_words: Sequence[Sequence[int]] = ()
    _plain_from: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        params = self.params
        uncut = params.top_k <= 0 and params.top_p == 1.0 and params.min_p == 0.0
        plain = (params.greedy or uncut) and params.num_logprobs is None
        plain = plain and not needs_adjustment(params, params.min_tokens) and self.mask is None
        object.__setattr__(self, "_plain_from", params.min_tokens if plain else math.inf)

    @property
    def is_plain(self) -> bool:
        """Whether the largest logit alone decides, or that with noise, and nothing is reported about it."""
        return len(self.output_token_ids) >= self._plain_from

    @property
    def is_cut(self) -> bool:
        """Whether min_p, top_k and top_p are all that stands between the logits and a draw."""
        return not self.params.greedy and self.params.num_logprobs is None and not self.is_adjusted

    @property
    def draw(self) -> tuple[int, int, float]:
        """What its noise depends on: seed, number of tokens and temperature, 0 for greedy choice."""
        params = self.params
        return self.seed, len(self.output_token_ids), 0.0 if params.greedy else params.temperature

    @property
    def is_adjusted(self) -> bool:
        return self.mask is not None or needs_adjustment(self.params, len(self.output_token_ids))


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token.

    Attributes:
        token_id: -1 where there is an error.
        logprob: its log-probability before temperature and penalties; None unless asked for.
        top: the same for it and the likeliest alternatives; empty unless asked for.
        error: why no token could be chosen.
    """

    token_id: int
    logprob: float | None = None
    top: TokenLogprobs = field(default_factory=dict)
    error: VAttentionError | None = None


def sample(predictions: Predictions, indices: Sequence[int], rows: Sequence[SampleRow]) -> list[SampledToken]:
    """Choose a token for each row; one row's bad logits are that row's error alone.

    Args:
        predictions: of which row `indices[i]` foretells the next token of `rows[i]`.
    """
    if not rows:
        return []
    plain: list[int] = []
    others: list[int] = []
    for i, row in enumerate(rows):
        (plain if row.is_plain else others).append(i)
    chosen: dict[int, SampledToken] = {}
    if plain:
        noise = noise_for([rows[i].draw for i in plain])
        token_ids, largest = predictions.likeliest([indices[i] for i in plain], noise)
        for i, token_id, value in zip(plain, token_ids.tolist(), largest.tolist(), strict=True):
            error = logits_error(value)
            chosen[i] = SampledToken(token_id) if error is None else SampledToken(-1, error=error)
    if others:
        logits = predictions.logits([indices[i] for i in others])
        by_way: dict[Callable[..., list[SampledToken]], list[int]] = {}
        for at, i in enumerate(others):
            way = _draw_together if rows[i].is_cut and _sorts_well(logits) else _choose_each
            by_way.setdefault(way, []).append(at)
        for way, places in by_way.items():
            some = logits if len(places) == len(others) else logits[places]
            tokens = way(some, [rows[others[at]] for at in places])
            chosen.update(zip((others[at] for at in places), tokens, strict=True))
    return [chosen[i] for i in range(len(rows))]


def _sorts_well(logits: torch.Tensor) -> bool:
    """Whether all rows are cut in less time where they are than one by one on the host."""
    return logits.is_cuda


def _draw_together(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[SampledToken]:
    """Rows of which `is_cut` is true."""
    _, largest = GivenLogits(logits).likeliest(range(len(rows)))
    left = cut(logits, [row.params for row in rows])
    token_ids, _ = GivenLogits(left).likeliest(range(len(rows)), noise_for([row.draw for row in rows]))
    errors = [logits_error(value) for value in largest.tolist()]
    return [
        SampledToken(token_id) if error is None else SampledToken(-1, error=error)
        for token_id, error in zip(token_ids.tolist(), errors, strict=True)
    ]


def _choose_each(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[SampledToken]:
    token_ids, largest = GivenLogits(logits).likeliest(range(len(rows)))
    return [
        _choose(one, row, int(token_id), float(value))
        for one, row, token_id, value in zip(logits, rows, token_ids, largest, strict=True)
    ]


def prompt_logprobs(logits: torch.Tensor, token_ids: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Log-probabilities of known tokens and of the `count` likeliest ones.

    Args:
        logits: [n, V]; row i foretells `token_ids[i]`.
    """
    return [token_logprobs(_host(row), token, count) for row, token in zip(logits, token_ids, strict=True)]


def validate(params: SamplingParams, vocab_size: int) -> None:
    """Check token ids in the parameters against the vocabulary.

    Raises:
        RequestError: one is out of range.
    """
    for name, token_ids in (
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids),
    ):
        wrong = next((t for t in token_ids if not 0 <= t < vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"{name} has token id {wrong}; this model's run from 0 to {vocab_size - 1}", param=name
            )


def _host(logits: torch.Tensor) -> Row:
    array: Row = logits.detach().cpu().numpy()
    return array


def _choose(logits: torch.Tensor, wanted: SampleRow, likeliest: int, largest: float) -> SampledToken:
    error = logits_error(largest)
    if error is not None:
        return SampledToken(-1, error=error)
    params = wanted.params
    raw = row = _host(logits)
    if wanted.is_adjusted:
        row = raw.copy()
        adjust(
            row,
            params,
            wanted.prompt_token_ids,
            wanted.output_token_ids,
            wanted.end_token_ids,
            wanted.bad_words,
        )
        if wanted.mask is not None:
            try:
                wanted.mask.apply(row, wanted.output_token_ids)
            except VAttentionError as failure:
                return SampledToken(-1, error=failure)
        likeliest = int(row.argmax())
        largest = float(row[likeliest])
        error = logits_error(largest)
        if error is not None:
            return SampledToken(-1, error=error)
    token_id = likeliest
    if not params.greedy:
        token_id = draw(row, largest, params, noise_for([wanted.draw]))
    if params.num_logprobs is None:
        return SampledToken(token_id)
    report = token_logprobs(raw, token_id, params.num_logprobs)
    return SampledToken(token_id, report[token_id].logprob, report)


def logits_error(largest: float) -> VAttentionError | None:
    """What is wrong with a row whose largest logit this is; a NaN anywhere is the largest."""
    if math.isfinite(largest):
        return None
    if largest == -math.inf:
        return VAttentionError(
            "no token is left to choose: every logit is -inf; allowed_token_ids, bad_words, logit_bias, or "
            "min_tokens with stop_token_ids, may forbid them all"
        )
    return VAttentionError(
        f"the model computed {largest} as a logit; a dtype with more range may help, such as dtype='float32' or "
        "'bfloat16' instead of 'float16'"
    )
