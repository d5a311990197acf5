"""Which sequences get tokens from a forward pass, from which of its rows."""

from __future__ import annotations

import torch

from tests.engine.fakes import VOCAB
from tests.engine.test_plan import sequence
from vattention.engine.draws import sample
from vattention.engine.plan import Plan
from vattention.model.predictions import GivenLogits
from vattention.sampling_params import SamplingParams


def rows_for(*token_ids: int) -> GivenLogits:
    """Predictions of these tokens, all others being next to impossible."""
    logits = torch.zeros(len(token_ids), VOCAB)
    logits[range(len(token_ids)), list(token_ids)] = 100.0
    return GivenLogits(logits)


def test_prompts_that_are_not_computed_yet_get_none() -> None:
    first, second, third = sequence(6, 0), sequence(9, 1), sequence(3, 2)
    plan = Plan()
    for one, count in ((first, 6), (second, 4), (third, 3)):
        plan.put(one, count)
    draws = sample(plan, rows_for(7, 8))
    assert draws.sampling == [first, third]
    assert [token.token_id for token in draws.tokens] == [7, 8]
    assert (draws.beams, draws.proposals) == ([], [])


def test_samples_that_are_to_fork_draw_from_the_same_row() -> None:
    other, one = sequence(2, 0), sequence(6, 1)
    one.request.unforked = [one.branch(1), one.branch(2)]
    plan = Plan()
    plan.put(other, 2)
    plan.put(one, 6)
    draws = sample(plan, rows_for(4, 9))
    assert draws.sampling == [other, one, *one.request.unforked]
    assert [token.token_id for token in draws.tokens] == [4, 9, 9, 9]


def test_rows_of_a_prompt_are_reported_and_its_last_one_sampled() -> None:
    one = sequence(4, 0, SamplingParams(max_tokens=3, prompt_logprobs=1, temperature=0.0))
    plan = Plan()
    plan.put(one, 4)
    draws = sample(plan, rows_for(5, 6, 5, 8))
    assert [token.token_id for token in draws.tokens] == [8]
    report = one.request.prompt_logprobs
    assert report is not None
    assert report[0] is None
    assert [entry[5].rank for entry in report[1:] if entry is not None] == [1, 7, 1]
