"""Greedy tokens are the same whoever manages the memory, and however much of it is shared, taken away or swapped.

Every load has prompts that begin alike, several samples of one prompt, and a second turn of a conversation; it runs
with plenty of memory and with so little that sequences are preempted.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.engine.test_parity import NUM_TOKENS, engine_for, generated, prompts_for
from tests.engine.test_scheduler import run
from tests.model.architectures import ARCHITECTURES
from vattention.engine.engine import LLMEngine
from vattention.sampling_params import SamplingParams

NAMES = ("llama", "mistral", "gemma3", "gpt2", "qwen3-moe")

MANAGERS: dict[str, dict[str, Any]] = {
    "virtual": {},
    "virtual sliced": {"kv_layout": "sliced"},
    "virtual, no prefix cache": {"enable_prefix_caching": False},
    "paged": {"kv": "paged"},
    "paged, blocks of a token": {"kv": "paged", "block_size": 1},
    "paged, no prefix cache": {"kv": "paged", "enable_prefix_caching": False},
    "reserved, max": {"kv": "reserved"},
    "reserved, pow2": {"kv": "reserved", "reservation": "pow2"},
    "reserved, oracle": {"kv": "reserved", "reservation": "oracle"},
}

TURN = [7, 8, 9]


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


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("name", NAMES)
def test_tokens(name: str, manager: str) -> None:
    options = MANAGERS[manager]
    engine = engine_for(load(name)[0], max_num_seqs=16, **options)
    assert check(engine, name) == 0
    engine.close()

    engine = engine_for(load(name)[0], max_num_seqs=16, kv_memory=memory_for_two(name, options), **options)
    num_preemptions = check(engine, name)
    if options.get("kv") == "reserved":
        assert num_preemptions == 0
    elif name != "mistral":  # whose layers all have windows, so that it does with less
        assert num_preemptions > 0
    engine.close()


def memory_for_two(name: str, options: dict[str, Any]) -> int:
    """Bytes that hold little more than two of the load's longest sequences."""
    engine = engine_for(load(name)[0], max_num_seqs=4, **options)
    longest = max(len(prompt) for prompt in load(name)[1]) + 2 * NUM_TOKENS + len(TURN)
    slot = engine.manager.take([0] * longest, max_tokens=longest).slot
    engine.manager.ensure(slot, max(longest - 48, 0), longest)
    nbytes = engine.manager.accounts().mapped_nbytes
    engine.close()
    return 2 * nbytes


def check(engine: LLMEngine, name: str) -> int:
    """Serve the load; returns how often a sequence was preempted."""
    _, prompts, answers, seconds = load(name)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        several = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, n=3)
        engine.add_request(f"1.{index}", {"prompt_token_ids": prompt}, several if index == 1 else params)
    first = run(engine)
    for index, answer in enumerate(answers):
        for sample in first[f"1.{index}"].outputs:
            assert sample.token_ids == answer, (index, sample.index)
    for index in range(3):
        turn = prompts[index] + answers[index] + TURN
        engine.add_request(f"2.{index}", {"prompt_token_ids": turn}, params)
    second = run(engine)
    for index, answer in enumerate(seconds):
        assert second[f"2.{index}"].outputs[0].token_ids == answer, index
    return sum(o.metrics.num_preemptions for o in (*first.values(), *second.values()) if o.metrics)
