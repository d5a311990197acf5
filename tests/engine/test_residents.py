"""Who gets a slot beside those that run: as many as the memory they do not share allows, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.fakes import PAGE, completion, fake_engine, fake_manager
from tests.engine.managers import MANAGERS, engine_over
from tests.engine.test_scheduler import greedy, run
from vattention.engine.engine import LLMEngine

STEM = [5 + i % 40 for i in range(40)]
PROMPTS = [[*STEM, 2 + i] for i in range(6)]
NUM_TOKENS = 4
"""The last of them is never computed: 44 tokens need memory, 11 pages in a plane of full attention."""

WHOLE = 2 * 11 + 2 * 3
"""Pages of one sequence: keys and values of all tokens, and of what a window of 8 reaches."""

OWN = 2 * 1 + 2 * 1
"""Of those, the ones behind the stem."""

SHARING = {name: MANAGERS[name] for name in ("virtual", "paged")}


def engine_with(options: dict[str, Any], pages: int) -> LLMEngine:
    return engine_over(options, num_slots=8, limit_pages=pages, budget=8)


def most_at_once(engine: LLMEngine) -> int:
    """Serve all prompts, which must get their tokens without a preemption; returns how many ran together."""
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, greedy(NUM_TOKENS))
    most = 0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        most = max(most, len(outputs))
        for output in outputs:
            assert output.metrics is not None
            assert output.metrics.num_preemptions == 0
            prompt = PROMPTS[int(output.request_id)]
            assert output.outputs[0].token_ids == completion(prompt, len(output.outputs[0].token_ids))
    engine.close()
    return most


@pytest.mark.parametrize("options", SHARING.values(), ids=SHARING)
@pytest.mark.parametrize("count", range(1, 7))
def test_sharers_need_room_for_what_they_do_not_share(count: int, options: dict[str, Any]) -> None:
    exactly = WHOLE + (count - 1) * OWN
    for pages in (exactly, exactly + OWN - 1):
        assert most_at_once(engine_with(options, pages)) == count


@pytest.mark.parametrize("options", SHARING.values(), ids=SHARING)
def test_one_prefix_of_the_cache_serves_many(options: dict[str, Any]) -> None:
    """The first to take it needs room for all of it; its pages stand behind a slot that no sequence has."""
    engine = engine_with(options, 1000)
    engine.add_request("before", {"prompt_token_ids": [*STEM, 48, 48, 48, 48]}, greedy(1))
    run(engine)
    engine.manager.set_limit((WHOLE + 5 * OWN) * PAGE)
    assert most_at_once(engine) == 6


@pytest.mark.parametrize("options", SHARING.values(), ids=SHARING)
def test_without_a_common_beginning_each_needs_all(options: dict[str, Any]) -> None:
    engine = engine_with({**options, "enable_prefix_caching": False}, 2 * WHOLE - 1)
    assert most_at_once(engine) == 1


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_slot_that_graphs_do_not_need_is_nobodys(n: int) -> None:
    engine = fake_engine(num_slots=4, manager=fake_manager(5, 1000))
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, greedy(NUM_TOKENS, n))
    most = 0
    while engine.has_unfinished_requests():
        engine.step()
        most = max(most, len(engine._scheduler.running))
    assert most == 4
    engine.close()
