from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import pytest

from vattention.bench import throughput
from vattention.bench.throughput import Timeline, measure, warm_up
from vattention.bench.workload import BenchRequest
from vattention.core import TokensPrompt
from vattention.errors import ConfigError, OutOfMemoryError
from vattention.kv.manager import Accounts
from vattention.outputs import CompletionOutput, RequestOutput
from vattention.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vattention.engine.engine import LLMEngine

MIB = 2**20


class OneTokenAStep:
    """An engine whose step takes a second and gives each sample a token, except for the very first step."""

    def __init__(self, clock: Iterator[float], stop_after: int = 1000, error: Exception | None = None) -> None:
        self.clock = clock
        self.stop_after = stop_after
        self.error = error
        self.requests: dict[str, tuple[TokensPrompt, SamplingParams]] = {}
        self.outputs: dict[str, RequestOutput] = {}
        self.steps = 0
        self.peak_step = 0

    @property
    def manager(self) -> OneTokenAStep:
        return self

    def accounts(self) -> Accounts:
        mapped = (10 - abs(self.steps - 3)) * MIB
        return Accounts(100 * MIB, 50 * MIB, mapped, mapped, mapped // 2, 0, 0)

    def add_request(self, request_id: str, prompt: TokensPrompt, params: SamplingParams) -> None:
        self.requests[request_id] = (prompt, params)
        samples = [CompletionOutput(index, "", []) for index in range(params.n)]
        self.outputs[request_id] = RequestOutput(request_id, None, list(prompt["prompt_token_ids"]), samples, False)

    def has_unfinished_requests(self) -> bool:
        return bool(self.outputs)

    def step(self) -> list[RequestOutput]:
        self.steps += 1
        next(self.clock)
        moved = list(self.outputs.values())
        for output in moved:
            params = self.requests[output.request_id][1]
            if self.steps > 1:
                for sample in output.outputs:
                    sample.token_ids.append(0)
            if self.error is not None:
                output.error = self.error
            if len(output.outputs[0].token_ids) == min(params.max_tokens or 0, self.stop_after):
                del self.outputs[output.request_id]
        return moved


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """Seconds that go on by one with each step and stand still between."""
    now = [0.0]

    def tick() -> Iterator[float]:
        for _ in itertools.count():
            now[0] += 1.0
            yield now[0]

    monkeypatch.setattr("vattention.bench.throughput.time.perf_counter", lambda: now[0])
    return tick()


def request(num_prompt: int, max_tokens: int, n: int = 1) -> BenchRequest:
    return BenchRequest(list(range(num_prompt)), SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True))


def as_engine(fake: OneTokenAStep) -> LLMEngine:
    return cast("LLMEngine", fake)


def test_figures_of_a_run_with_known_times(clock: Iterator[float]) -> None:
    figures = measure(as_engine(OneTokenAStep(clock)), [request(10, 4), request(30, 2, n=3)])
    # One step for the prompts, then four of a second each.
    assert figures.elapsed_s == 5.0
    assert (figures.num_requests, figures.num_prompt_tokens, figures.num_output_tokens) == (2, 40, 4 + 2 * 3)
    assert figures.num_steps == 5
    assert (figures.prompt_tokens_per_s, figures.output_tokens_per_s) == (8.0, 2.0)
    assert figures.total_tokens_per_s == 10.0
    assert (figures.ttft_p50_s, figures.ttft_p99_s) == (2.0, 2.0)
    assert (figures.itl_p50_s, figures.itl_p99_s) == (1.0, 1.0)
    assert figures.kv_peak["mapped_nbytes"] == 10 * MIB
    assert figures.peak_rss_bytes > 0
    assert figures.rss_before_bytes > 0


def test_the_json_has_the_keys_that_scripts_read(clock: Iterator[float]) -> None:
    written = json.loads(json.dumps(measure(as_engine(OneTokenAStep(clock)), [request(10, 4)]).to_json()))
    keys = (
        "elapsed_s output_tokens_per_s total_tokens_per_s ttft_p50_s ttft_p99_s itl_p50_s itl_p99_s peak_rss_bytes"
    )
    assert set(keys.split()) <= written.keys()
    assert written["versions"].keys() == {"vattention", "torch", "transformers"}
    assert written["kv_peak"]["reserved_nbytes"] == 100 * MIB


def test_the_summary_says_what_is_left_out(clock: Iterator[float]) -> None:
    summary = measure(as_engine(OneTokenAStep(clock)), [request(10, 1)]).summary()
    assert "without model load and warm-up" in summary
    assert "next tokens none" in summary


def test_tokens_that_come_together_share_the_time() -> None:
    timeline = Timeline()
    sample = CompletionOutput(0, "", [1])
    output = RequestOutput("0", None, [5], [sample], False)
    timeline.update(output, 10.0)
    timeline.update(output, 11.0)
    sample.token_ids.extend([2, 3])
    timeline.update(output, 14.0)
    assert timeline.first_token_at == 10.0
    assert timeline.gaps == [2.0, 2.0]
    assert timeline.num_tokens == 3


def test_less_work_than_asked_for_is_an_error(clock: Iterator[float]) -> None:
    with pytest.raises(ConfigError, match="request 0 got 2 of 4 tokens; raise max_model_len to 14"):
        measure(as_engine(OneTokenAStep(clock, stop_after=2)), [request(10, 4)])


def test_a_failed_request_ends_the_run_with_its_error(clock: Iterator[float]) -> None:
    with pytest.raises(OutOfMemoryError):
        measure(as_engine(OneTokenAStep(clock, error=OutOfMemoryError(2, 1, "no pages"))), [request(10, 4)])


def test_warm_up_is_short_and_shares_no_prefix_with_the_work(clock: Iterator[float]) -> None:
    engine = OneTokenAStep(clock)
    warm_up(as_engine(engine), [request(500, 100) for _ in range(20)])
    assert not engine.has_unfinished_requests()
    assert len(engine.requests) == throughput.WARM_UP_REQUESTS
    for prompt, params in engine.requests.values():
        assert params.max_tokens == throughput.WARM_UP_OUTPUT_TOKENS
        assert list(prompt["prompt_token_ids"]) == list(range(throughput.WARM_UP_PROMPT_TOKENS))[::-1]
