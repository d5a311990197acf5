from __future__ import annotations

from tests.engine.fakes import fake_engine
from vattention.engine.engine import LLMEngine
from vattention.engine.stats import FinishedStats, StepStats
from vattention.sampling_params import SamplingParams


class Recorder:
    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.finished: list[FinishedStats] = []

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_finished(self, stats: FinishedStats) -> None:
        self.finished.append(stats)

    def total(self, name: str) -> int:
        return sum(getattr(step, name) for step in self.steps)

    def count(self, name: str) -> int:
        return sum(len(getattr(step, name)) for step in self.steps)


def recorded(engine: LLMEngine) -> Recorder:
    recorder = Recorder()
    engine.add_listener(recorder)
    return recorder


def greedy(max_tokens: int | None, n: int = 1) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, n=n)


def run(engine: LLMEngine) -> None:
    while engine.has_unfinished_requests():
        engine.step()


def test_steps_add_up_to_the_requests() -> None:
    engine = fake_engine(max_num_batched_tokens=8)
    recorder = recorded(engine)
    engine.add_request("a", {"prompt_token_ids": [5] * 20}, greedy(4))
    engine.add_request("b", {"prompt_token_ids": [6] * 3}, greedy(6))
    run(engine)
    assert recorder.total("num_prompt_tokens") == 23
    assert recorder.total("num_generated_tokens") == 10
    assert recorder.count("times_to_first_token_s") == 2
    assert recorder.count("inter_token_latencies_s") == 8
    assert recorder.steps[-1].num_running == recorder.steps[-1].num_waiting == 0
    assert all(step.duration_s >= 0 for step in recorder.steps)


def test_a_finished_request_counts_all_its_samples() -> None:
    engine = fake_engine()
    recorder = recorded(engine)
    engine.add_request("a", {"prompt_token_ids": [5, 6]}, greedy(4, n=3))
    run(engine)
    [finished] = recorder.finished
    assert (finished.finish_reason, finished.n, finished.max_tokens) == ("length", 3, 4)
    assert (finished.num_prompt_tokens, finished.num_generated_tokens, finished.num_longest_tokens) == (2, 12, 4)
    assert finished.metrics.finished_time is not None


def test_the_gravest_reason_counts() -> None:
    """Of a sample that has ended and one that still waits for a slot."""
    engine = fake_engine(num_slots=1)
    recorder = recorded(engine)
    engine.add_request("a", {"prompt_token_ids": [5]}, greedy(3, n=2))
    reasons: list[str | None] = [None, None]
    while reasons == [None, None]:
        reasons = [sample.finish_reason for output in engine.step() for sample in output.outputs] or reasons
    assert reasons == ["length", None]
    engine.abort("a")
    assert [finished.finish_reason for finished in recorder.finished] == ["abort"]


def test_preemptions_are_counted_and_tokens_timed_across_them() -> None:
    engine = fake_engine(num_slots=4, limit_pages=40)
    recorder = recorded(engine)
    for name in "abc":
        engine.add_request(name, {"prompt_token_ids": [5] * 8}, greedy(40))
    run(engine)
    preemptions = recorder.total("num_preemptions")
    assert preemptions > 0
    assert sum(finished.metrics.num_preemptions for finished in recorder.finished) == preemptions
    assert recorder.total("num_generated_tokens") == 120
    assert recorder.count("times_to_first_token_s") == 3
    assert recorder.count("inter_token_latencies_s") == 117
