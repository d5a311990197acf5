"""Tokens are the same whoever manages the memory, and however much of it is shared, taken away or swapped.

Those of models, in a load whose prompts begin alike, with several samples of one prompt and second turns of
conversations, with plenty of memory and with so little that sequences are preempted. And those of a fake model, to
which requests come in any order under a limit that moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule, run_state_machine_as_test

from tests.engine.managers import MANAGERS, engine_over
from tests.engine.test_parity import NUM_TOKENS, engine_for, generated, prompts_for
from tests.engine.test_scheduler import EngineMachine, greedy, run
from tests.model.architectures import ARCHITECTURES
from vattention.engine.engine import LLMEngine
from vattention.sampling_params import SamplingParams

TURN = [7, 8, 9]


@dataclass(frozen=True)
class Shortage:
    """What it takes for memory to run short.

    Attributes:
        num_longest: how many of the load's longest sequences there is memory for.
        num_samples: by prompt, where it is not one.
    """

    num_longest: float
    num_samples: dict[int, int]


USUAL = Shortage(2, {1: 3})

MODELS = {
    "llama": USUAL,
    # With windows in all layers sequences do not grow. But samples of the last prompts, which fork while all others
    # run, take memory that nobody has reckoned with.
    "mistral": Shortage(1.5, {4: 6, 6: 6}),
    "gemma3": USUAL,
    "gpt2": USUAL,
    "qwen3-moe": USUAL,
}


SPARING = [MANAGERS["reserved, pow2"], MANAGERS["reserved, oracle"]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models move a few bytes at a time, for which threads cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def load(name: str) -> tuple[Any, list[list[int]], list[list[int]], list[list[int]]]:
    """A model, prompts, what it says to them, and what it says to a second turn of the first three."""
    model = ARCHITECTURES[name]()
    first, *others = prompts_for(model, 6)
    stem = (first * 40)[:40]
    prompts = [stem + other[:15] for other in others] + others[:2]
    answers = [generated(model, prompt) for prompt in prompts]
    turns = [prompt + answer + TURN for prompt, answer in zip(prompts[:3], answers[:3], strict=True)]
    return model, prompts, answers, [generated(model, turn) for turn in turns]


def pairs() -> Iterator[tuple[str, str]]:
    """Models with managers. How much is reserved makes no difference to a model: one is enough for that."""
    for name in MODELS:
        yield from ((name, manager) for manager in MANAGERS if name == "gemma3" or MANAGERS[manager] not in SPARING)


@pytest.mark.parametrize(("name", "manager"), list(pairs()))
def test_models(name: str, manager: str) -> None:
    options = MANAGERS[manager]
    with closing(engine_for(load(name)[0], max_num_seqs=16, **options)) as engine:
        assert check(engine, name) == 0
    with closing(
        engine_for(load(name)[0], max_num_seqs=16, kv_memory=little_memory(name, options), **options)
    ) as engine:
        # Who reserves a sequence's memory when it comes takes none away from those that run.
        assert (check(engine, name) > 0) == (options.get("kv") != "reserved")


def little_memory(name: str, options: dict[str, Any]) -> int:
    """Bytes that hold little more than so many of the load's longest sequences."""
    with closing(engine_for(load(name)[0], max_num_seqs=4, **options)) as engine:
        longest = max(len(prompt) for prompt in load(name)[1]) + 2 * NUM_TOKENS + len(TURN)
        slot = engine.manager.take([0] * longest, max_tokens=longest).slot
        engine.manager.ensure(slot, max(longest - 48, 0), longest)
        return int(MODELS[name].num_longest * engine.manager.accounts().mapped_nbytes)


def check(engine: LLMEngine, name: str) -> int:
    """Serve the load; returns how often a sequence was preempted."""
    _, prompts, answers, seconds = load(name)

    def params(n: int) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, n=n)

    for index, prompt in enumerate(prompts):
        engine.add_request(
            f"1.{index}", {"prompt_token_ids": prompt}, params(MODELS[name].num_samples.get(index, 1))
        )
    first = run(engine)
    for index, answer in enumerate(answers):
        for sample in first[f"1.{index}"].outputs:
            assert sample.token_ids == answer, (index, sample.index)
    for index in range(3):
        turn = prompts[index] + answers[index] + TURN
        engine.add_request(f"2.{index}", {"prompt_token_ids": turn}, params(1))
    second = run(engine)
    for index, answer in enumerate(seconds):
        assert second[f"2.{index}"].outputs[0].token_ids == answer, index
    return sum(o.metrics.num_preemptions for o in (*first.values(), *second.values()) if o.metrics)


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
