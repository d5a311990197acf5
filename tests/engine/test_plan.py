from __future__ import annotations

import pytest

from tests.engine.fakes import fake_engine
from tests.engine.test_scheduler import greedy
from vattention.core import Chunk
from vattention.engine.plan import Plan
from vattention.engine.sequence import Sequence
from vattention.sampling_params import SamplingParams


def sequence(num_tokens: int, slot: int, params: SamplingParams | None = None) -> Sequence:
    """One that has a slot and nothing in it."""
    request = fake_engine().prepare("x", {"prompt_token_ids": [5] * num_tokens}, params or greedy(3))
    (made,) = request.sequences
    made.slot = slot
    return made


@pytest.mark.parametrize(
    ("count", "prompt_logprobs", "num_logits"), [(4, None, 0), (6, None, 1), (4, 1, 4), (6, 1, 6)]
)
def test_rows_get_logits_that_sample_or_are_reported(
    count: int, prompt_logprobs: int | None, num_logits: int
) -> None:
    plan = Plan()
    plan.put(sequence(6, 2, SamplingParams(max_tokens=3, prompt_logprobs=prompt_logprobs)), count)
    assert plan.chunks == [Chunk(2, 0, [5] * count, num_logits)]


def test_what_is_withdrawn_leaves_its_room_to_others() -> None:
    first, second, third = sequence(6, 0), sequence(4, 1), sequence(9, 2)
    plan = Plan()
    for one, count in ((first, 6), (second, 2), (third, 9)):
        plan.put(one, count)
    assert plan.num_tokens == 17
    plan.withdraw([first, third])
    assert plan.sequences == [second]
    assert [chunk.slot for chunk in plan.chunks] == [1]
    assert plan.num_tokens == 2
