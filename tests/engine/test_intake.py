from __future__ import annotations

from typing import Any

import pytest

from tests.engine.fakes import END, VOCAB, completion, fake_engine
from tests.engine.test_scheduler import run
from vattention.errors import ContextLengthError, RequestError
from vattention.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (5, "a prompt is a text"),
        ({}, "a prompt is a text"),
        ("hello", "no tokenizer"),
        ({"prompt": "hello"}, "no tokenizer"),
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt_token_ids": [VOCAB]}, f"from 0 to {VOCAB - 1}"),
        ({"prompt_token_ids": [-1]}, "not a token id"),
        ({"prompt_token_ids": [1.5]}, "not a token id"),
        ({"prompt_token_ids": [True]}, "not a token id"),
    ],
)
def test_prompts_that_are_none_are_refused(prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        fake_engine().prepare("x", prompt, SamplingParams())


def test_a_prompt_must_leave_room_for_a_token() -> None:
    engine = fake_engine()
    engine.prepare("x", {"prompt_token_ids": [5] * 63}, SamplingParams())
    with pytest.raises(ContextLengthError, match="64 tokens") as refusal:
        engine.prepare("x", {"prompt_token_ids": [5] * 64}, SamplingParams())
    assert refusal.value.code == "context_length_exceeded"


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(RequestError, match="tokenizer") as refusal:
        fake_engine().prepare("x", {"prompt_token_ids": [5]}, SamplingParams(stop="."))
    assert refusal.value.param == "stop"


def test_without_a_limit_generation_runs_to_the_end_of_the_context() -> None:
    engine = fake_engine()
    engine.add_request("x", {"prompt_token_ids": [5] * 10}, SamplingParams(temperature=0, max_tokens=None))
    sample = run(engine)["x"].outputs[0]
    assert sample.finish_reason == "length"
    assert sample.token_ids == completion([5] * 10, 54)


def test_seeds_come_from_the_request_or_else_from_the_engine() -> None:
    engine = fake_engine()
    seeded = engine.prepare("a", {"prompt_token_ids": [5]}, SamplingParams(seed=7, n=3))
    assert [sequence.seed for sequence in seeded.sequences] == [7, 8, 9]
    first, second = (engine.prepare("b", {"prompt_token_ids": [5]}, SamplingParams()) for _ in range(2))
    assert first.sequences[0].seed != second.sequences[0].seed
    again = fake_engine()
    again.prepare("a", {"prompt_token_ids": [5]}, SamplingParams())
    assert (
        again.prepare("b", {"prompt_token_ids": [5]}, SamplingParams()).sequences[0].seed == first.sequences[0].seed
    )


def test_end_tokens_and_stop_tokens_end_a_sequence() -> None:
    prompt = [9, 4]
    said = completion(prompt, 6)
    for params, count, reason in [
        (SamplingParams(temperature=0, max_tokens=6, stop_token_ids=[said[2]]), said.index(said[2]) + 1, said[2]),
        (SamplingParams(temperature=0, max_tokens=6, logit_bias={END: 100.0}), 1, None),
    ]:
        engine = fake_engine()
        engine.add_request("x", {"prompt_token_ids": prompt}, params)
        sample = run(engine)["x"].outputs[0]
        assert len(sample.token_ids) == count
        assert sample.finish_reason == "stop"
        assert sample.stop_reason == reason


def test_ignore_eos_and_min_tokens_go_past_the_end_token() -> None:
    forced = {END: 100.0}
    engine = fake_engine()
    engine.add_request(
        "ignore",
        {"prompt_token_ids": [5]},
        SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logit_bias=forced),
    )
    engine.add_request(
        "min",
        {"prompt_token_ids": [5]},
        SamplingParams(temperature=0, max_tokens=9, min_tokens=3, logit_bias=forced),
    )
    outputs = run(engine)
    assert outputs["ignore"].outputs[0].token_ids == [END] * 4
    assert outputs["ignore"].outputs[0].finish_reason == "length"
    assert outputs["min"].outputs[0].token_ids == [*completion([5], 3), END]


@pytest.mark.parametrize("budget", [3, 16])
def test_prompt_logprobs_cover_every_token_once_however_the_prompt_is_cut(budget: int) -> None:
    engine = fake_engine(max_num_batched_tokens=budget)
    prompt = [7, *completion([7], 19)]
    engine.add_request(
        "x",
        {"prompt_token_ids": prompt},
        SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1, logprobs=2, n=2),
    )
    output = run(engine)["x"]
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True):
        assert entry is not None
        assert entry[token].rank == 1
    for sample in output.outputs:
        assert sample.logprobs is not None
        assert [len(entry) for entry in sample.logprobs] == [2, 2, 2]
        assert sample.cumulative_logprob == pytest.approx(
            sum(entry[token].logprob for entry, token in zip(sample.logprobs, sample.token_ids, strict=True))
        )
