"""Proposals against sorting every row, with equal logits on both sides of the cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vattention.model.proposals import propose
from vattention.model.sampler import SampleRow
from vattention.sampling_params import SamplingParams


def row(output: list[int] | None = None, **params: Any) -> SampleRow:
    return SampleRow(SamplingParams(use_beam_search=True, **params), 0, [1], output or [], frozenset({0}))


@pytest.mark.parametrize("levels", [2, 10, 10**6])
@pytest.mark.parametrize("vocab_size", [3, 40, 3000])
def test_the_likeliest_come_first_and_of_equals_the_smaller_id(vocab_size: int, levels: int) -> None:
    torch.manual_seed(levels)
    logits = torch.randint(-levels, levels, (7, vocab_size)).float() / levels * 9
    before = logits.clone()
    counts = [1, 2, 5, 8, 8, 16, 20]
    for own, given, count in zip(propose(logits, [row()] * 7, counts), logits, counts, strict=True):
        order = sorted(range(vocab_size), key=lambda t: (-float(given[t]), t))[:count]
        assert own.error is None
        assert own.token_ids.tolist() == order
        assert own.logprobs == pytest.approx(torch.log_softmax(given.double(), -1)[order].numpy(), abs=1e-5)
    assert torch.equal(logits, before)


def test_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(1)
    logits = torch.randn(6, 500)
    together = propose(logits, [row()] * 6, [4, 8, 2, 30, 8, 8])
    for own, given, count in zip(together, logits, [4, 8, 2, 30, 8, 8], strict=True):
        (alone,) = propose(given[None], [row()], [count])
        assert alone.token_ids.tolist() == own.token_ids.tolist()
        assert np.array_equal(alone.logprobs, own.logprobs)


def test_parameters_shape_the_probabilities_of_their_row_alone() -> None:
    logits = torch.zeros(3, 10)
    rows = [row(logit_bias={7: 5.0}), row(), row([], min_tokens=2)]
    biased, plain, young = propose(logits, rows, [10] * 3)
    assert biased.token_ids[0] == 7
    assert biased.logprobs[0] == pytest.approx(5 - np.log(9 + np.exp(5)))
    assert plain.token_ids.tolist() == list(range(10))
    assert young.token_ids.tolist() == [*range(1, 10), 0]
    assert young.logprobs[-1] == -np.inf
    assert young.logprobs[0] == pytest.approx(-np.log(9))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_logits_are_an_error_of_their_row_alone(value: float) -> None:
    logits = torch.randn(3, 20)
    logits[1, 5] = value
    first, bad, last = propose(logits, [row()] * 3, [4] * 3)
    assert first.error is None
    assert last.error is None
    assert str(value) in str(bad.error)


def test_a_report_has_the_likeliest_and_the_chosen_one() -> None:
    (own,) = propose(torch.arange(10.0)[None], [row()], [6])
    chosen = own.choose(4, 2)
    assert chosen.token_id == 5
    assert {token: entry.rank for token, entry in chosen.top.items()} == {5: 5, 9: 1, 8: 2}
    assert chosen.logprob == chosen.top[5].logprob == own.logprobs[4]
    assert own.choose(0, None).top == {}


def test_no_rows() -> None:
    assert propose(torch.empty(0, 10), [], []) == []
