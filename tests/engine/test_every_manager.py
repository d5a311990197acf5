"""The engine over every memory manager: the same tokens, whatever a manager shares, reserves or runs out of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule, run_state_machine_as_test

from tests.engine.fakes import PAGE, SPECS, FakeRunner, completion, fake_engine
from tests.engine.test_scheduler import EngineMachine, greedy, run
from vattention.config import EngineConfig
from vattention.engine.engine import LLMEngine
from vattention.kv.build import create_manager

MANAGERS: dict[str, dict[str, Any]] = {
    "virtual": {},
    "virtual, no prefix cache": {"enable_prefix_caching": False},
    "paged": {"kv": "paged", "block_size": 4},
    "paged, blocks of a token": {"kv": "paged", "block_size": 1},
    "paged, no prefix cache": {"kv": "paged", "enable_prefix_caching": False},
    "reserved": {"kv": "reserved"},
    "reserved, pow2": {"kv": "reserved", "reservation": "pow2"},
    "reserved, oracle": {"kv": "reserved", "reservation": "oracle"},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The fake model moves a few bytes at a time, for which threads cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def engine_over(
    options: dict[str, Any], *, num_slots: int, limit_pages: int, budget: int, runner: FakeRunner | None = None
) -> LLMEngine:
    config = EngineConfig(model="fake", max_num_seqs=num_slots, kv_memory=limit_pages * PAGE, **options)
    manager = create_manager(config, SPECS, dtype=torch.float32, device="cpu", max_len=64)
    return fake_engine(num_slots=num_slots, max_num_batched_tokens=budget, manager=manager, runner=runner)


@pytest.mark.parametrize("options", MANAGERS.values(), ids=MANAGERS)
def test_histories(options: dict[str, Any]) -> None:
    class Machine(EngineMachine):
        @initialize(slots=st.integers(1, 5), budget=st.integers(1, 30), pages=st.integers(70, 200))
        def build(self, slots: int, budget: int, pages: int) -> None:
            self.engine = engine_over(options, num_slots=slots, limit_pages=pages, budget=budget)
            self.wanted = {}
            self.outputs = {}
            self.aborted = set()

        @rule(count=st.integers(1, 30), length=st.integers(1, 34), other=st.integers(2, 4))
        def add_alike(self, count: int, length: int, other: int) -> None:
            """Prompts that begin alike."""
            name = str(len(self.wanted))
            prompt = [*range(2, 2 + length), other]
            self.engine.add_request(name, {"prompt_token_ids": prompt}, greedy(count))
            self.wanted[name] = prompt, count, 1

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=5, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_common_prefixes_are_computed_once() -> None:
    options = {"kv": "paged", "block_size": 4, "enable_prefix_caching": True}
    runner = FakeRunner()
    engine = engine_over(options, num_slots=16, limit_pages=1000, budget=100, runner=runner)
    prompts = [[*range(2, 34), last, 3] for last in range(2, 10)]
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, greedy(5, n=2))
    outputs = run(engine)
    for index, prompt in enumerate(prompts):
        assert [o.token_ids for o in outputs[str(index)].outputs] == [completion(prompt, 5)] * 2
    assert runner.num_computed <= 34 + 7 * 2 + 8 * 2 * 4
    engine.close()
