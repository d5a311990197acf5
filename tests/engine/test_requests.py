"""Requests from their start to the end of their last sequence."""

from __future__ import annotations

from tests.engine.fakes import completion, fake_engine
from tests.engine.test_scheduler import greedy, run
from vattention.engine.engine import LLMEngine
from vattention.engine.request import Request
from vattention.sampling_params import SamplingParams

PROMPT = [5, 6, 7, 8, 9]


def started(engine: LLMEngine, params: SamplingParams) -> Request:
    request = engine.prepare("x", {"prompt_token_ids": PROMPT}, params)
    engine.start(request)
    return request


def test_samples_end_with_the_one_that_they_were_to_fork_from() -> None:
    engine = fake_engine()
    request = started(engine, SamplingParams(n=3, max_tokens=4))
    error = RuntimeError("broken")
    assert engine._requests.end(request.sequences[:1], "error", error) == request.sequences
    assert [sequence.finish_reason for sequence in request.sequences] == ["error"] * 3
    assert request.error is error
    assert request.metrics.finished_time is not None
    assert list(engine._requests) == []


def test_a_request_lasts_until_its_last_sequence_ends() -> None:
    engine = fake_engine()
    request = started(engine, SamplingParams(n=2, max_tokens=4, temperature=1.0))
    engine.step()
    first, second = request.sequences
    engine._requests.end([first], "abort")
    assert engine._requests.get("x") is request
    assert request.metrics.finished_time is None
    engine._requests.end([second], "abort")
    assert engine._requests.get("x") is None


def test_what_is_forgotten_has_not_ended_and_goes_on_elsewhere() -> None:
    engine, other = fake_engine(), fake_engine()
    request = started(engine, greedy(4))
    engine.step()
    engine._requests.forget(request)
    assert not engine.has_unfinished_requests()
    assert engine.statistics().num_running == engine.statistics().num_waiting == 0
    assert request.sequences[0].finish_reason is None
    other._requests.go_on(request)
    assert run(other)["x"].outputs[0].token_ids == completion(PROMPT, 4)
