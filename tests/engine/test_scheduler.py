"""Scheduling on the null driver and a fake model: every request gets its own tokens, whatever happens around it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.engine.fakes import PAGE, FakeRunner, completion, fake_engine
from vattention.engine.engine import LLMEngine
from vattention.errors import OutOfMemoryError
from vattention.outputs import RequestOutput
from vattention.sampling_params import SamplingParams


def greedy(max_tokens: int, n: int = 1) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, n=n)


def run(engine: LLMEngine) -> dict[str, RequestOutput]:
    finished: dict[str, RequestOutput] = {}
    for _ in range(10_000):
        if not engine.has_unfinished_requests():
            return finished
        finished.update({output.request_id: output for output in engine.step() if output.finished})
    raise AssertionError("the engine never finished")


class EngineMachine(RuleBasedStateMachine):
    """Requests of all lengths and priorities under a limit that moves, with aborts."""

    @initialize(slots=st.integers(1, 5), budget=st.integers(1, 30), pages=st.integers(60, 200))
    def build(self, slots: int, budget: int, pages: int) -> None:
        self.engine = fake_engine(num_slots=slots, max_num_batched_tokens=budget, limit_pages=pages)
        self.wanted: dict[str, tuple[list[int], int, int]] = {}
        self.outputs: dict[str, RequestOutput] = {}
        self.aborted: set[str] = set()

    @rule(
        prompt=st.lists(st.integers(2, 49), min_size=1, max_size=40),
        count=st.integers(1, 30),
        n=st.integers(1, 3),
        priority=st.integers(0, 2),
    )
    def add(self, prompt: list[int], count: int, n: int, priority: int) -> None:
        name = str(len(self.wanted))
        self.engine.add_request(name, {"prompt_token_ids": prompt}, greedy(count, n), priority)
        self.wanted[name] = prompt, count, n

    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.outputs.update({output.request_id: output for output in self.engine.step()})

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.wanted:
            name = data.draw(st.sampled_from(sorted(self.wanted)))
            self.engine.abort(name)
            if name not in self.outputs or not self.outputs[name].finished:
                self.aborted.add(name)

    @rule(pages=st.integers(60, 200))
    def limit(self, pages: int) -> None:
        self.engine.manager.set_limit(pages * PAGE)

    @invariant()
    def memory_stays_within_the_limit(self) -> None:
        accounts = self.engine.manager.accounts()
        assert accounts.mapped_nbytes <= accounts.limit_nbytes + self.engine.manager.excess_nbytes

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.manager.set_limit(1000 * PAGE)
        self.outputs.update(run(self.engine))
        for name, (prompt, count, n) in self.wanted.items():
            if name in self.aborted:
                continue
            output = self.outputs[name]
            for sample in output.outputs:
                expected = completion(prompt, min(count, 64 - len(prompt)))
                if sample.finish_reason == "error":
                    assert isinstance(output.error, OutOfMemoryError)
                    expected = expected[: len(sample.token_ids)]
                assert sample.token_ids == expected
            assert len(output.outputs) == n
        assert self.engine.statistics().num_running == 0
        self.engine.manager.drop_warm()
        assert self.engine.manager.accounts().mapped_nbytes == 0
        self.engine.close()


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_step_stays_within_the_token_budget_and_decodes_first() -> None:
    engine = fake_engine(max_num_batched_tokens=8)
    engine.add_request("short", {"prompt_token_ids": [3]}, greedy(20))
    engine.step()
    engine.add_request("long", {"prompt_token_ids": [4] * 30}, greedy(2))
    for _ in range(3):
        plan = engine._scheduler.schedule()
        assert plan.num_tokens == 8
        assert [len(chunk.token_ids) for chunk in plan.chunks] == [1, 7]
        for chunk, sequence in zip(plan.chunks, plan.sequences, strict=True):
            sequence.num_computed = chunk.end
            if chunk.end == sequence.num_tokens:
                sequence.output_token_ids.append(5)


def test_shortage_preempts_the_latest_and_tokens_stay_the_same() -> None:
    prompts = {str(i): [i + 2] * (4 + i) for i in range(4)}
    engine = fake_engine(limit_pages=60)
    for name, prompt in prompts.items():
        engine.add_request(name, {"prompt_token_ids": prompt}, greedy(40))
    outputs = run(engine)
    preemptions = {name: output.metrics.num_preemptions for name, output in outputs.items() if output.metrics}
    assert preemptions["0"] == 0
    assert sum(preemptions.values()) > 0
    for name, prompt in prompts.items():
        assert outputs[name].outputs[0].token_ids == completion(prompt, 40)


def test_priority_goes_before_arrival() -> None:
    engine = fake_engine(num_slots=1)
    engine.add_request("later", {"prompt_token_ids": [3]}, greedy(3), priority=1)
    engine.add_request("sooner", {"prompt_token_ids": [4]}, greedy(3), priority=0)
    assert list(run(engine)) == ["sooner", "later"]


def test_a_sequence_that_never_fits_fails_alone() -> None:
    engine = fake_engine(limit_pages=24)
    engine.add_request("large", {"prompt_token_ids": [5] * 40}, greedy(4))
    engine.add_request("grows", {"prompt_token_ids": [6] * 4}, greedy(50))
    engine.add_request("small", {"prompt_token_ids": [7] * 4}, greedy(4))
    outputs = run(engine)
    assert outputs["small"].outputs[0].token_ids == completion([7] * 4, 4)
    for name in ("large", "grows"):
        assert outputs[name].outputs[0].finish_reason == "error"
        assert isinstance(outputs[name].error, OutOfMemoryError)
        assert "kv_memory" in str(outputs[name].error)


def test_a_prompt_is_cut_as_short_as_its_windows_need() -> None:
    """Whole, it would need a window's memory for each of its tokens; what fits alone fits in small chunks."""
    prompt = [5 + i for i in range(42)]
    engine = fake_engine(limit_pages=2 * 11 + 2 * 3, max_num_batched_tokens=64)
    engine.add_request("alone", {"prompt_token_ids": prompt}, greedy(3))
    outputs = run(engine)
    assert outputs["alone"].error is None
    assert outputs["alone"].outputs[0].token_ids == completion(prompt, 3)


def test_a_failing_forward_ends_its_sequences_and_no_others() -> None:
    engine = fake_engine(num_slots=2, runner=FakeRunner(fail_at=3))
    for name in "abc":
        engine.add_request(name, {"prompt_token_ids": [5, 6]}, greedy(6))
    outputs = run(engine)
    assert [outputs[name].outputs[0].finish_reason for name in "abc"] == ["error", "error", "length"]
    assert isinstance(outputs["a"].error, RuntimeError)
    assert outputs["c"].outputs[0].token_ids == completion([5, 6], 6)
    engine.manager.drop_warm()
    assert engine.manager.accounts().mapped_nbytes == 0


def test_abort_frees_memory_at_once() -> None:
    engine = fake_engine()
    engine.add_request("a", {"prompt_token_ids": [5] * 20}, greedy(30))
    engine.step()
    engine.step()
    assert engine.manager.accounts().live_nbytes > 0
    engine.abort("a")
    engine.abort("a")
    assert engine.manager.accounts().live_nbytes == 0
    assert not engine.has_unfinished_requests()


@pytest.mark.parametrize("priority", [0, 1])
def test_waiting_requests_can_be_aborted(priority: int) -> None:
    engine = fake_engine(num_slots=1)
    engine.add_request("a", {"prompt_token_ids": [5]}, greedy(3))
    engine.add_request("b", {"prompt_token_ids": [6]}, greedy(3), priority)
    engine.step()
    engine.abort("b")
    assert list(run(engine)) == ["a"]
