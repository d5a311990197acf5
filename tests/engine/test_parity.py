"""Greedy tokens equal transformers' `generate`, through the whole engine, for every architecture.

Batches are mixed: prompts of different lengths, prompts cut into chunks, and in the end so little memory that
sequences are preempted and computed again.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.engine.test_scheduler import run
from tests.model.architectures import ARCHITECTURES
from vattention.config import EngineConfig
from vattention.engine.engine import LLMEngine
from vattention.engine.parts import Parts
from vattention.kv.build import create_manager, create_swap_space
from vattention.model.fingerprint import fingerprint
from vattention.model.probe import probe
from vattention.model.runner import ModelRunner
from vattention.sampling_params import SamplingParams

MAX_LEN = 128
NUM_TOKENS = 24


def engine_for(
    model: PreTrainedModel, *, max_num_seqs: int, kv_memory: int | None = None, **options: Any
) -> LLMEngine:
    attention = probe(model)
    config = EngineConfig(
        model="tiny",
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=48,
        kv_memory=kv_memory or 1 << 30,
        **options,
    )
    manager = create_manager(config, attention.cache_specs, dtype=model.dtype, device="cpu", max_len=MAX_LEN)
    parts = Parts(
        name="tiny",
        manager=manager,
        runner=ModelRunner(model, attention, manager),
        tokenizer=None,
        vocab_size=model.config.get_text_config().vocab_size,
        max_model_len=MAX_LEN,
        end_token_ids=frozenset(),
        default_sampling={},
        cache_specs=attention.cache_specs,
        fingerprint=fingerprint(model),
        swap_space=create_swap_space(config, "cpu"),
    )
    return LLMEngine(config, parts)


def prompts_for(model: PreTrainedModel, count: int) -> list[list[int]]:
    rng = random.Random(count)
    vocab_size = model.config.get_text_config().vocab_size
    return [[rng.randrange(3, vocab_size) for _ in range(rng.randint(1, 60))] for _ in range(count)]


def generated(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    tokens = model.generate(
        torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return [int(token) for token in tokens[0, len(prompt) :]]


def served(engine: LLMEngine, prompts: list[list[int]]) -> tuple[list[list[int]], int]:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    outputs = run(engine)
    preemptions = sum(output.metrics.num_preemptions for output in outputs.values() if output.metrics)
    return [outputs[str(index)].outputs[0].token_ids for index in range(len(prompts))], preemptions


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_tokens_equal_generate_in_mixed_batches_and_under_preemption(name: str) -> None:
    model = ARCHITECTURES[name]()
    prompts = prompts_for(model, 12)
    expected = [generated(model, prompt) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) > len(expected) // 2

    engine = engine_for(model, max_num_seqs=32)
    assert served(engine, prompts)[0] == expected
    engine.manager.drop_warm()
    assert engine.manager.accounts().mapped_nbytes == 0
    longest = max(len(prompt) for prompt in prompts) + NUM_TOKENS
    engine.close()

    probe_engine = engine_for(model, max_num_seqs=4)
    slot = probe_engine.manager.take([0]).slot
    probe_engine.manager.ensure(slot, 0, longest)
    enough_for_two = 2 * probe_engine.manager.accounts().mapped_nbytes
    probe_engine.close()

    engine = engine_for(model, max_num_seqs=32, kv_memory=enough_for_two)
    tokens, preemptions = served(engine, prompts)
    assert tokens == expected
    assert preemptions > 0
    engine.close()


@pytest.mark.parametrize("batch", [1, 2, 7, 32])
def test_batch_sizes(batch: int) -> None:
    model = ARCHITECTURES["llama"]()
    prompts = prompts_for(model, batch)
    expected = [generated(model, prompt) for prompt in prompts]
    engine = engine_for(model, max_num_seqs=32)
    assert served(engine, prompts)[0] == expected
    engine.close()


def test_a_seed_reproduces_its_sample_whatever_else_runs() -> None:
    model = ARCHITECTURES["llama"]()
    prompts = prompts_for(model, 6)
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=3, max_tokens=NUM_TOKENS, ignore_eos=True)
    engine = engine_for(model, max_num_seqs=32)
    engine.add_request("alone", {"prompt_token_ids": prompts[0]}, params)
    alone = run(engine)["alone"].outputs[0].token_ids
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    assert run(engine)["0"].outputs[0].token_ids == alone
    engine.close()
