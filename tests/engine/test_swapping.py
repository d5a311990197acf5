"""Preemption by swapping: the same tokens as by recomputation and as alone, and nothing left behind."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant

from tests.engine.fakes import FakeRunner, completion, fake_engine
from tests.engine.test_parity import NUM_TOKENS, engine_for, generated, prompts_for, served
from tests.engine.test_scheduler import EngineMachine, greedy, run
from tests.engine.test_suspend import MANAGERS
from tests.model.architectures import ARCHITECTURES
from vattention.engine.engine import LLMEngine
from vattention.engine.preemption import SwapPolicy
from vattention.engine.sequence import Sequence as EngineSequence
from vattention.kv.manager import KVManager
from vattention.kv.swap import SwapSpace, file_space, memory_space

PROMPTS = {str(i): [i + 2] * (4 + i) for i in range(4)}
SMALL = 60
"""Pages that do not hold what `PROMPTS` become."""


class Always(SwapPolicy):
    """Swaps, or never does, and loads what was swapped."""

    def __init__(self, *choices: bool) -> None:
        super().__init__()
        self._choices = choices
        self._asked = 0

    def swaps(self, nbytes: int, num_tokens: int) -> bool:
        self._asked += 1
        return self._choices[self._asked % len(self._choices)]

    def loads(self, nbytes: int, num_tokens: int) -> bool:
        return num_tokens > 0


@pytest.fixture(params=["memory", "file"])
def space(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SwapSpace]:
    in_memory = request.param == "memory"
    with closing(memory_space(1 << 30, "cpu") if in_memory else file_space(tmp_path, 1 << 30)) as made:
        yield made


def force(engine: LLMEngine, policy: SwapPolicy) -> LLMEngine:
    engine._swapper._policy = policy
    return engine


def waiting(engine: LLMEngine) -> Sequence[EngineSequence]:
    return [sequence for _, sequence in engine._scheduler._waiting]


def crowded(
    space: SwapSpace, policy: SwapPolicy, runner: FakeRunner | None = None, manager: KVManager | None = None
) -> LLMEngine:
    """An engine with more to do than it has memory for."""
    engine = force(fake_engine(limit_pages=SMALL, swap_space=space, runner=runner, manager=manager), policy)
    for name, prompt in PROMPTS.items():
        engine.add_request(name, {"prompt_token_ids": prompt}, greedy(40))
    return engine


def finished_right(engine: LLMEngine) -> int:
    """Run to the end, where all tokens must be right; returns how many preemptions that took."""
    outputs = run(engine)
    for name, prompt in PROMPTS.items():
        assert outputs[name].outputs[0].token_ids == completion(prompt, 40)
    return sum(output.metrics.num_preemptions for output in outputs.values() if output.metrics)


@pytest.mark.parametrize("choices", [(True,), (False,), (True, False)], ids=["swapped", "recomputed", "both"])
def test_tokens_are_the_same_however_preempted(choices: tuple[bool, ...], space: SwapSpace) -> None:
    runner = FakeRunner()
    engine = crowded(space, Always(*choices), runner)
    assert finished_right(engine) > 0
    needed = sum(len(prompt) + 40 - 1 for prompt in PROMPTS.values())
    assert (runner.num_computed == needed) == (choices == (True,)), "only swapping computes every token once"
    assert (space.num_images, space.used_nbytes) == (0, 0)
    engine.close()


@pytest.mark.parametrize("manager", MANAGERS)
def test_every_managers_memory_can_be_swapped(manager: str, space: SwapSpace) -> None:
    runner = FakeRunner()
    engine = crowded(space, Always(True), runner, MANAGERS[manager](SMALL))
    assert finished_right(engine) > 0
    assert runner.num_computed == sum(len(prompt) + 40 - 1 for prompt in PROMPTS.values())
    assert (space.num_images, space.used_nbytes) == (0, 0)
    engine.close()


def test_statistics_tell_what_is_swapped(space: SwapSpace) -> None:
    engine = crowded(space, Always(True))
    while not (now := engine.statistics()).num_swapped:
        engine.step()
    assert now.num_swapped == 1
    assert now.num_waiting >= 1
    assert now.swapped_nbytes == space.used_nbytes > 0
    assert now.swap_space_nbytes == 1 << 30
    while engine.has_unfinished_requests():
        engine.step()
        assert all(sequence.image is None for sequence in engine._scheduler.running)
    assert engine.statistics().num_swapped == engine.statistics().swapped_nbytes == 0
    engine.close()


def test_aborted_while_swapped(space: SwapSpace) -> None:
    engine = crowded(space, Always(True))
    while not space.num_images:
        engine.step()
    engine.abort(next(s.request.id for s in waiting(engine) if s.image is not None))
    assert (space.num_images, space.used_nbytes) == (0, 0)
    run(engine)
    engine.close()


def test_closing_frees_what_is_swapped(space: SwapSpace) -> None:
    engine = crowded(space, Always(True))
    while not space.num_images:
        engine.step()
    engine.close()
    assert (space.num_images, space.used_nbytes) == (0, 0)


@pytest.mark.parametrize("call", ["writev", "readv"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_failing_files_cost_computing_again(
    call: str,
    number: int,
    every: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, logger="vattention")
    original, uses = getattr(os, call), 0

    def failing(descriptor: int, buffers: list[memoryview]) -> int:
        nonlocal uses
        uses += 1
        if uses % every == 0:
            raise OSError(number, os.strerror(number))
        moved: int = original(descriptor, [buffers[0][:1000]])
        return moved

    monkeypatch.setattr(f"vattention.kv.swap.os.{call}", failing)
    descriptors = len(os.listdir("/proc/self/fd"))
    space = file_space(tmp_path, 1 << 30)
    engine = crowded(space, Always(True))
    assert finished_right(engine) > 0
    assert uses > 0
    assert (space.num_images, space.used_nbytes) == (0, 0)
    engine.manager.drop_warm()
    assert engine.manager.accounts().mapped_nbytes == 0
    engine.close()
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_a_full_space_costs_computing_again() -> None:
    space = memory_space(1, "cpu")
    engine = crowded(space, Always(True))
    assert finished_right(engine) > 0
    engine.close()


class SwappingMachine(EngineMachine):
    """The same as without swapping, and images only of those that wait."""

    @initialize(
        slots=st.integers(1, 5),
        budget=st.integers(1, 30),
        pages=st.integers(60, 90),
        capacity=st.sampled_from([1, 100_000, 1 << 30]),
        choices=st.lists(st.booleans(), min_size=1, max_size=4),
    )
    def build(self, slots: int, budget: int, pages: int, capacity: int, choices: list[bool]) -> None:
        super().build(slots, budget, pages)
        self.engine.close()
        self.space = memory_space(capacity, "cpu")
        engine = fake_engine(
            num_slots=slots, max_num_batched_tokens=budget, limit_pages=pages, swap_space=self.space
        )
        self.engine = force(engine, Always(*choices))

    @invariant()
    def images_belong_to_those_that_wait(self) -> None:
        images = [sequence.image for sequence in waiting(self.engine) if sequence.image is not None]
        assert self.space.num_images == len(images)
        assert self.space.used_nbytes == sum(image.nbytes for image in images) <= self.space.capacity_nbytes
        assert all(sequence.image is None for sequence in self.engine._scheduler.running)

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "space"):
            assert (self.space.num_images, self.space.used_nbytes) == (0, 0)


TestSwappingMachine = SwappingMachine.TestCase
TestSwappingMachine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(("name", "kv_layout"), [("gemma3", "sliced"), ("llama", "per-layer")])
def test_a_models_tokens_equal_generate_when_swapped(name: str, kv_layout: Any) -> None:
    model = ARCHITECTURES[name]()
    prompts = prompts_for(model, 5)
    expected = [generated(model, prompt) for prompt in prompts]
    longest = max(len(prompt) for prompt in prompts) + NUM_TOKENS
    with closing(engine_for(model, max_num_seqs=4, kv_layout=kv_layout)) as engine:
        slot = engine.manager.take([0]).slot
        engine.manager.ensure(slot, 0, longest)
        enough_for_two = 2 * engine.manager.accounts().mapped_nbytes
    with closing(
        engine_for(model, max_num_seqs=32, kv_memory=enough_for_two, kv_layout=kv_layout, swap_space="64MiB")
    ) as engine:
        tokens, preemptions = served(force(engine, Always(True)), prompts)
        assert tokens == expected
        assert preemptions > 0
        assert engine.statistics().num_swapped == 0
