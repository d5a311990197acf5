"""Samples and requests that begin alike compute what they have in common once."""

from __future__ import annotations

import pytest

from tests.engine.fakes import FakeRunner, completion, fake_engine
from tests.engine.managers import MANAGERS, engine_over
from tests.engine.test_scheduler import greedy, run
from vattention.engine.engine import LLMEngine
from vattention.errors import RequestError
from vattention.sampling_params import SamplingParams

PROMPT = [5 + i % 40 for i in range(30)]


def sharing_engine(runner: FakeRunner, num_slots: int = 4) -> LLMEngine:
    return fake_engine(runner=runner, max_num_batched_tokens=64, num_slots=num_slots)


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_samples_fork_from_one_computed_prompt(prefix_cache: bool) -> None:
    runner = FakeRunner()
    engine = fake_engine(runner=runner, num_slots=4, max_num_batched_tokens=64, prefix_cache=prefix_cache)
    engine.add_request("x", {"prompt_token_ids": PROMPT}, greedy(10, n=4))
    (output,) = run(engine).values()
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]
    assert all(sample.token_ids == completion(PROMPT, 10) for sample in output.outputs)
    assert runner.num_computed == len(PROMPT) + 4 * 9


def test_samples_without_a_slot_wait_and_compute_for_themselves() -> None:
    engine = fake_engine(num_slots=2, prefix_cache=False)
    engine.add_request("x", {"prompt_token_ids": PROMPT}, greedy(10, n=5))
    (output,) = run(engine).values()
    assert all(sample.token_ids == completion(PROMPT, 10) for sample in output.outputs)


def test_samples_that_want_one_token_need_no_second_forward() -> None:
    runner = FakeRunner()
    engine = sharing_engine(runner)
    engine.add_request("x", {"prompt_token_ids": PROMPT}, greedy(1, n=3))
    (output,) = engine.step()
    assert output.finished
    assert [sample.token_ids for sample in output.outputs] == [completion(PROMPT, 1)] * 3
    assert engine.statistics().num_running == engine.statistics().num_waiting == 0


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_abort_ends_samples_that_have_not_forked_yet(steps: int) -> None:
    engine = fake_engine(max_num_batched_tokens=16)
    engine.add_request("x", {"prompt_token_ids": PROMPT}, greedy(10, n=3))
    for _ in range(steps):
        engine.step()
    engine.abort("x")
    assert not engine.has_unfinished_requests()
    assert engine.statistics().num_running == engine.statistics().num_waiting == 0
    engine.manager.drop_warm()
    assert engine.manager.accounts().mapped_nbytes == 0


def test_a_failing_prompt_fails_all_its_samples() -> None:
    engine = sharing_engine(FakeRunner(fail_at=1))
    engine.add_request("x", {"prompt_token_ids": PROMPT}, greedy(10, n=3))
    (output,) = run(engine).values()
    assert [sample.finish_reason for sample in output.outputs] == ["error"] * 3


def test_requests_that_come_together_compute_their_prefix_once() -> None:
    runner = FakeRunner()
    engine = sharing_engine(runner, num_slots=8)
    prompts = [[*PROMPT, 2 + i, 3 + i] for i in range(8)]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, greedy(5))
    outputs = run(engine)
    for i, prompt in enumerate(prompts):
        assert outputs[str(i)].outputs[0].token_ids == completion(prompt, 5)
    assert [outputs[str(i)].num_cached_tokens for i in range(8)] == [0] + [30] * 7
    assert runner.num_computed == 30 + 8 * 2 + 8 * 4


def test_in_blocks_too_what_is_common_is_computed_once() -> None:
    runner = FakeRunner()
    engine = engine_over(MANAGERS["paged"], num_slots=16, limit_pages=1000, budget=100, runner=runner)
    prompts = [[*range(2, 34), last, 3] for last in range(2, 10)]
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, greedy(5, n=2))
    outputs = run(engine)
    for index, prompt in enumerate(prompts):
        assert [o.token_ids for o in outputs[str(index)].outputs] == [completion(prompt, 5)] * 2
    assert runner.num_computed == 34 + 7 * 2 + 8 * 2 * 4
    engine.close()


def test_one_that_waits_for_a_prefix_holds_nobody_else_up() -> None:
    engine = fake_engine(max_num_batched_tokens=60)
    prompt = [*PROMPT, *PROMPT[:20]]
    engine.add_request("first", {"prompt_token_ids": prompt}, greedy(5))
    engine.add_request("alike", {"prompt_token_ids": [*prompt, 9]}, greedy(5))
    engine.add_request("other", {"prompt_token_ids": [7, 8, 9]}, greedy(5))
    engine.step()
    assert [sequence.request.id for sequence in engine._scheduler.running] == ["first", "other"]
    outputs = run(engine)
    assert outputs["alike"].num_cached_tokens == 50
    assert outputs["alike"].outputs[0].token_ids == completion([*prompt, 9], 5)
    assert outputs["other"].outputs[0].token_ids == completion([7, 8, 9], 5)


def test_a_conversation_that_goes_on_computes_only_what_is_new() -> None:
    runner = FakeRunner()
    engine = sharing_engine(runner)
    engine.add_request("1", {"prompt_token_ids": PROMPT}, greedy(10))
    (first,) = run(engine).values()
    turn = [*PROMPT, *first.outputs[0].token_ids, 4, 4]
    before = runner.num_computed
    engine.add_request("2", {"prompt_token_ids": turn}, greedy(3))
    (second,) = run(engine).values()
    assert second.outputs[0].token_ids == completion(turn, 3)
    assert second.num_cached_tokens == len(turn) - 3  # the last token generated was never computed
    assert runner.num_computed == before + 3 + 2


def test_salts_separate_prefixes() -> None:
    engine = sharing_engine(FakeRunner())
    cached = []
    for salt in ("a", "b", "a"):
        engine.add_request("x", {"prompt_token_ids": PROMPT, "cache_salt": salt}, greedy(2))
        (output,) = run(engine).values()
        cached.append(output.num_cached_tokens)
    assert cached == [0, 0, 29]
    with pytest.raises(RequestError, match="cache_salt"):
        engine.prepare("y", {"prompt_token_ids": PROMPT, "cache_salt": 3}, greedy(2))  # type: ignore[arg-type]


def test_prompt_logprobs_come_with_computing_the_whole_prompt() -> None:
    engine = sharing_engine(FakeRunner())
    for _ in range(2):
        params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0, n=30)
        engine.add_request("x", {"prompt_token_ids": PROMPT}, params)
        (output,) = run(engine).values()
        assert output.num_cached_tokens == 0
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(PROMPT)
        assert all(sample.token_ids == completion(PROMPT, 2) for sample in output.outputs)
