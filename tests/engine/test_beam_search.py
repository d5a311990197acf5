"""Beam search through the whole engine, against brute force: mixed batches, small budgets, preemption, aborts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.engine.beam_reference import coarse_logits, model_logits, search
from tests.engine.fakes import END, PAGE, VOCAB, FakeRunner, fake_engine
from tests.engine.managers import MANAGERS, engine_over
from tests.engine.test_parity import MAX_LEN, engine_for, generated, prompts_for
from tests.engine.test_scheduler import run
from tests.model.architectures import ARCHITECTURES
from vattention.core import Chunk
from vattention.engine.engine import LLMEngine
from vattention.errors import DriverError, OutOfMemoryError, RequestError
from vattention.outputs import RequestOutput
from vattention.sampling_params import SamplingParams

LOGITS = coarse_logits(VOCAB, 7)
PROMPT = [5 + i % 40 for i in range(21)]


class CoarseRunner(FakeRunner):
    """A model with few different logits, so that beams differ and often tie."""

    def logits(self, context: Sequence[int]) -> torch.Tensor:
        return LOGITS(context)


def beams(width: int, max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(n=width, use_beam_search=True, max_tokens=max_tokens, **options)


def coarse_engine(**options: Any) -> LLMEngine:
    return fake_engine(runner=CoarseRunner(**options.pop("runner", {})), **options)


def greedy_tokens(prompt: list[int], count: int, ends: frozenset[int] = frozenset({END})) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(LOGITS(tokens).argmax()))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


def check(output: RequestOutput, prompt: list[int], width: int, max_tokens: int) -> None:
    expected = search(LOGITS, prompt, width=width, max_tokens=max_tokens, ends=frozenset({END}))
    assert output.error is None
    assert output.finished
    assert [sample.index for sample in output.outputs] == list(range(len(expected)))
    assert [tuple(sample.token_ids) for sample in output.outputs] == [found.tokens for found in expected]
    assert [sample.cumulative_logprob for sample in output.outputs] == [found.cum_logprob for found in expected]


def check_all_memory_is_back(engine: LLMEngine) -> None:
    assert engine.statistics().num_running == engine.statistics().num_waiting == 0
    assert engine.manager.num_free_slots == engine.manager.num_slots
    assert engine.manager.accounts().live_nbytes == 0
    engine.manager.drop_warm()
    assert engine.manager.accounts().mapped_nbytes == 0


@pytest.mark.parametrize("budget", [1, 3, 8, 64])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_equals_brute_force_whatever_the_token_budget(budget: int, width: int) -> None:
    engine = coarse_engine(num_slots=8, max_num_batched_tokens=budget)
    engine.add_request("x", {"prompt_token_ids": PROMPT}, beams(width, 9))
    check(run(engine)["x"], PROMPT, width, 9)
    check_all_memory_is_back(engine)


def test_beams_and_samples_in_one_batch() -> None:
    engine = coarse_engine(num_slots=16, max_num_batched_tokens=24)
    for i in range(4):
        engine.add_request(f"b{i}", {"prompt_token_ids": PROMPT[i:]}, beams(2 + i % 3, 5 + i))
        params = SamplingParams(temperature=0, max_tokens=12)
        engine.add_request(f"s{i}", {"prompt_token_ids": PROMPT[: i + 3]}, params)
    outputs = run(engine)
    for i in range(4):
        check(outputs[f"b{i}"], PROMPT[i:], 2 + i % 3, 5 + i)
        assert outputs[f"s{i}"].outputs[0].token_ids == greedy_tokens(PROMPT[: i + 3], 12)
    check_all_memory_is_back(engine)


def test_only_new_tokens_are_computed() -> None:
    engine = coarse_engine(num_slots=8, max_num_batched_tokens=64)
    engine.add_request("x", {"prompt_token_ids": PROMPT}, beams(4, 9, ignore_eos=True))
    run(engine)
    runner: Any = engine._parts.runner
    assert runner.num_computed == len(PROMPT) + 8 * 4


def test_beams_that_die_give_back_their_memory_before_others_fork() -> None:
    engine = coarse_engine(num_slots=5, max_num_batched_tokens=64)
    engine.add_request("x", {"prompt_token_ids": PROMPT}, beams(5, 20, ignore_eos=True))
    died = 0
    while True:
        engine.step()
        if not engine.has_unfinished_requests():
            break
        group = next(iter(engine._requests)).beams
        assert group is not None
        with_slots = [beam for beam in group.live if beam.slot is not None]
        assert engine.manager.num_free_slots == 5 - len(with_slots)
        assert len(with_slots) == 5 - len(group.forks)
        now = engine.manager.accounts()
        assert now.token_nbytes <= len(with_slots) * group.live[0].num_tokens * token_nbytes(engine)
        died += engine.manager.num_free_slots
    assert died > 4  # as many as there are slots, and none to spare: forks found room every time
    assert engine.manager.accounts().live_nbytes == 0


def token_nbytes(engine: LLMEngine) -> int:
    views = [engine.manager.layer(index) for index in range(2)]
    return sum(t[0, 0].nbytes for view in views for t in (view.keys, view.values))


def test_beams_preempt_those_that_came_later_for_their_slots() -> None:
    engine = coarse_engine(num_slots=4, max_num_batched_tokens=64)
    engine.add_request("x", {"prompt_token_ids": PROMPT}, beams(4, 8))
    for i in range(6):
        engine.add_request(f"s{i}", {"prompt_token_ids": PROMPT[i:]}, SamplingParams(temperature=0, max_tokens=9))
    outputs = run(engine)
    check(outputs["x"], PROMPT, 4, 8)
    for i in range(6):
        assert outputs[f"s{i}"].outputs[0].token_ids == greedy_tokens(PROMPT[i:], 9)
    preempted = [output.metrics.num_preemptions for output in outputs.values() if output.metrics]
    assert not any(preempted)  # slots that beams will need are kept for them
    check_all_memory_is_back(engine)


def test_a_search_waits_until_there_are_slots_for_its_beams() -> None:
    engine = coarse_engine(num_slots=4, max_num_batched_tokens=64)
    for i in range(3):
        engine.add_request(
            f"s{i}", {"prompt_token_ids": PROMPT[i:]}, SamplingParams(temperature=0, max_tokens=9 + i)
        )
    engine.add_request("x", {"prompt_token_ids": PROMPT}, beams(3, 8))
    outputs = run(engine)
    check(outputs["x"], PROMPT, 3, 8)
    assert all(output.metrics and output.metrics.num_preemptions == 0 for output in outputs.values())


@pytest.mark.parametrize("budget", [8, 16])
@pytest.mark.parametrize("pages", [60, 76])
def test_groups_are_preempted_whole_and_find_the_same(pages: int, budget: int) -> None:
    engine = coarse_engine(num_slots=16, max_num_batched_tokens=budget, limit_pages=pages)
    for i in range(2):
        params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
        engine.add_request(f"s{i}", {"prompt_token_ids": PROMPT[i:4]}, params)
    for i in range(3):
        engine.add_request(str(i), {"prompt_token_ids": PROMPT[i * 2 :]}, beams(3, 12))
    preempted = 0
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        outputs.update({output.request_id: output for output in engine.step() if output.finished})
        for request in engine._requests:
            if request.beams is not None:
                held = [beam.slot is not None for beam in request.beams.live]
                waiting = [fork.child for fork in request.beams.forks]
                assert sum(held) in (0, len(held) - len(waiting))
    for i in range(2):
        assert outputs[f"s{i}"].outputs[0].token_ids == greedy_tokens(PROMPT[i:4], 50, ends=frozenset())
    for i in range(3):
        check(outputs[str(i)], PROMPT[i * 2 :], 3, 12)
        metrics = outputs[str(i)].metrics
        assert metrics is not None
        preempted += metrics.num_preemptions
    assert preempted > 0
    check_all_memory_is_back(engine)


def test_a_search_that_never_fits_fails_with_the_reason_and_alone() -> None:
    engine = coarse_engine(num_slots=8, limit_pages=40)
    engine.add_request("large", {"prompt_token_ids": PROMPT}, beams(8, 40, ignore_eos=True))
    engine.add_request("small", {"prompt_token_ids": [7] * 4}, beams(2, 4))
    outputs = run(engine)
    check(outputs["small"], [7] * 4, 2, 4)
    assert isinstance(outputs["large"].error, OutOfMemoryError)
    assert "kv_memory" in str(outputs["large"].error)
    assert "8 beams" in str(outputs["large"].error)
    assert outputs["large"].outputs[0].finish_reason == "error"
    check_all_memory_is_back(engine)


@pytest.mark.parametrize("steps", range(0, 12, 2))
def test_abort(steps: int) -> None:
    engine = coarse_engine(num_slots=4, max_num_batched_tokens=8)
    engine.add_request("x", {"prompt_token_ids": PROMPT}, beams(4, 30))
    for _ in range(steps):
        engine.step()
    engine.abort("x")
    assert not engine.has_unfinished_requests()
    check_all_memory_is_back(engine)


@pytest.mark.parametrize("fail_at", range(1, 9))
def test_a_failing_forward_ends_the_whole_search(fail_at: int) -> None:
    engine = coarse_engine(num_slots=4, max_num_batched_tokens=3, runner={"fail_at": fail_at})
    engine.add_request("x", {"prompt_token_ids": PROMPT[:6]}, beams(4, 30))
    engine.add_request("later", {"prompt_token_ids": PROMPT[:5]}, beams(4, 5))
    outputs = run(engine)
    assert isinstance(outputs["x"].error, RuntimeError)
    assert outputs["x"].outputs[0].finish_reason == "error"
    check(outputs["later"], PROMPT[:5], 4, 5)
    check_all_memory_is_back(engine)


@pytest.mark.parametrize("method", ["ensure", "fork"])
@pytest.mark.parametrize("nth", range(1, 12, 2))
def test_a_driver_that_fails_one_beam_ends_its_search_alone(
    method: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watching(CoarseRunner):
        def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
            assert {chunk.slot for chunk in chunks} <= {beam.slot for beam in engine._scheduler.running}
            return super().forward(chunks)

    engine = fake_engine(runner=Watching(), num_slots=4, max_num_batched_tokens=64)
    call, count = getattr(engine.manager, method), itertools.count(1)

    def failing(*args: int) -> Any:
        if next(count) == nth:
            raise DriverError("injected", 5, "refused")
        return call(*args)

    monkeypatch.setattr(engine.manager, method, failing)
    engine.add_request("x", {"prompt_token_ids": PROMPT}, beams(4, 12, ignore_eos=True))
    engine.add_request("later", {"prompt_token_ids": PROMPT[:5]}, beams(4, 5))
    outputs = run(engine)
    assert isinstance(outputs["x"].error, DriverError)
    assert {sample.finish_reason for sample in outputs["x"].outputs} == {"error"}
    check(outputs["later"], PROMPT[:5], 4, 5)
    check_all_memory_is_back(engine)


def test_forks_and_prompts_share_the_token_budget() -> None:
    counts: list[int] = []

    class Counting(CoarseRunner):
        def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
            counts.append(sum(len(chunk.token_ids) for chunk in chunks))
            return super().forward(chunks)

    engine = fake_engine(runner=Counting(), num_slots=8, max_num_batched_tokens=6)
    engine.add_request("x", {"prompt_token_ids": PROMPT[:4]}, beams(5, 9))
    for i in range(3):
        engine.add_request(str(i), {"prompt_token_ids": PROMPT[i:] * 2}, beams(1, 3))
    outputs = run(engine)
    check(outputs["x"], PROMPT[:4], 5, 9)
    for i in range(3):
        check(outputs[str(i)], PROMPT[i:] * 2, 1, 3)
    assert max(counts) == 6


def test_bad_logits_end_their_search_alone() -> None:
    class Broken(CoarseRunner):
        def logits(self, context: Sequence[int]) -> torch.Tensor:
            row = super().logits(context)
            return row * float("nan") if len(context) == len(PROMPT) + 3 else row

    engine = fake_engine(runner=Broken(), num_slots=8)
    engine.add_request("x", {"prompt_token_ids": PROMPT}, beams(3, 9))
    engine.add_request("short", {"prompt_token_ids": PROMPT[:3]}, beams(3, 9))
    outputs = run(engine)
    assert "nan" in str(outputs["x"].error)
    check(outputs["short"], PROMPT[:3], 3, 9)
    check_all_memory_is_back(engine)


def test_more_beams_than_slots_are_refused() -> None:
    engine = coarse_engine(num_slots=4)
    with pytest.raises(RequestError, match=r"5 beams needs as many slots.*has 4.*max_num_seqs"):
        engine.prepare("x", {"prompt_token_ids": PROMPT}, beams(5, 3))


def test_a_search_cannot_be_suspended(tmp_path: Path) -> None:
    engine = coarse_engine()
    engine.add_request("x", {"prompt_token_ids": PROMPT}, beams(2, 3))
    with pytest.raises(RequestError, match="beam search cannot be suspended"):
        engine.suspend("x", tmp_path / "search")
    check(run(engine)["x"], PROMPT, 2, 3)


def test_best_of_returns_the_likeliest_samples_best_first() -> None:
    engine = coarse_engine(num_slots=8)
    prompt: Any = {"prompt_token_ids": PROMPT}
    all_of_them = SamplingParams(n=6, seed=3, max_tokens=8, logprobs=0)
    engine.add_request("all", prompt, all_of_them)
    engine.add_request("best", prompt, SamplingParams(n=2, best_of=6, seed=3, max_tokens=8))
    outputs = run(engine)
    drawn = sorted(outputs["all"].outputs, key=lambda sample: -(sample.cumulative_logprob or 0.0))
    best = outputs["best"].outputs
    assert [sample.token_ids for sample in best] == [sample.token_ids for sample in drawn[:2]]
    assert [sample.cumulative_logprob for sample in best] == [sample.cumulative_logprob for sample in drawn[:2]]
    assert [sample.index for sample in best] == [0, 1]
    assert best[0].logprobs is None
    assert drawn[0].cumulative_logprob != drawn[-1].cumulative_logprob
    check_all_memory_is_back(engine)


class SearchMachine(RuleBasedStateMachine):
    """Searches and samples of all kinds under a limit that moves, with aborts."""

    def start(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.wanted: dict[str, tuple[list[int], int, int]] = {}
        self.outputs: dict[str, RequestOutput] = {}
        self.aborted: set[str] = set()

    @rule(
        prompt=st.lists(st.integers(2, 49), min_size=1, max_size=25),
        max_tokens=st.integers(1, 12),
        width=st.integers(0, 3),
        priority=st.integers(0, 2),
    )
    def add(self, prompt: list[int], max_tokens: int, width: int, priority: int) -> None:
        name = str(len(self.wanted))
        params = beams(width, max_tokens) if width else SamplingParams(temperature=0, max_tokens=max_tokens)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params, priority)
        self.wanted[name] = prompt, width, max_tokens

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
        for name, (prompt, width, max_tokens) in self.wanted.items():
            output = self.outputs.get(name)
            if name in self.aborted or output is None or isinstance(output.error, OutOfMemoryError):
                assert name in self.aborted or output is not None
            elif width:
                check(output, prompt, width, max_tokens)
            else:
                assert output.outputs[0].token_ids == greedy_tokens(prompt, max_tokens)
        check_all_memory_is_back(self.engine)
        self.engine.close()


@pytest.mark.parametrize("options", MANAGERS.values(), ids=MANAGERS)
def test_histories(options: dict[str, Any]) -> None:
    class Machine(SearchMachine):
        @initialize(slots=st.integers(3, 8), budget=st.integers(1, 30), pages=st.integers(60, 200))
        def build(self, slots: int, budget: int, pages: int) -> None:
            self.start(
                engine_over(options, num_slots=slots, limit_pages=pages, budget=budget, runner=CoarseRunner())
            )

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=5, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("gemma3", {"enable_prefix_caching": True}),
        ("gpt-oss", {"kv_layout": "sliced"}),
        ("gpt2", {"enable_prefix_caching": True, "kv_layout": "sliced"}),
    ],
    ids=["llama", "gemma3-cache", "gpt-oss-sliced", "gpt2-cache-sliced"],
)
def test_models_find_what_brute_force_finds(name: str, options: dict[str, Any]) -> None:
    model = ARCHITECTURES[name]()
    prompts = prompts_for(model, 3)
    width, max_tokens = 3, 8
    expected = [search(model_logits(model), p, width=width, max_tokens=max_tokens) for p in prompts]
    expected_greedy = [generated(model, prompt) for prompt in prompts]

    def check_engine(engine: LLMEngine) -> int:
        for index, prompt in enumerate(prompts):
            greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
            engine.add_request(f"s{index}", {"prompt_token_ids": prompt}, greedy)
            engine.add_request(f"b{index}", {"prompt_token_ids": prompt}, beams(width, max_tokens))
            engine.add_request(f"t{index}", {"prompt_token_ids": prompt[:1] + prompt}, greedy)
        outputs = run(engine)
        for index in range(len(prompts)):
            found = outputs[f"b{index}"].outputs
            assert [tuple(each.token_ids) for each in found] == [each.tokens for each in expected[index]]
            for mine, theirs in zip(found, expected[index], strict=True):
                assert mine.cumulative_logprob == pytest.approx(theirs.cum_logprob, abs=2e-4)
            assert outputs[f"s{index}"].outputs[0].token_ids == expected_greedy[index]
        preemptions = sum(output.metrics.num_preemptions for output in outputs.values() if output.metrics)
        engine.manager.drop_warm()
        assert engine.manager.accounts().mapped_nbytes == 0
        engine.close()
        return preemptions

    check_engine(engine_for(model, max_num_seqs=32, **options))
    probe = engine_for(model, max_num_seqs=1, **options)
    slot = probe.manager.take([0]).slot
    probe.manager.ensure(slot, 0, MAX_LEN)
    one_row = probe.manager.accounts().mapped_nbytes
    probe.close()
    assert check_engine(engine_for(model, max_num_seqs=32, kv_memory=2 * one_row, **options)) > 0
