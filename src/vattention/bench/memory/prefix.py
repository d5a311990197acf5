"""What sharing a prefix is worth: the same requests with and without it, simulated on a GPU and live."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from statistics import median

import numpy as np

from vattention.bench.memory.device import VOCAB_SIZE, SimulatedDevice
from vattention.bench.memory.scenarios import Scenario
from vattention.bench.memory.simulate import simulated_engine
from vattention.bench.memory.variants import Variant
from vattention.bench.throughput import measure, warm_up
from vattention.bench.workload import BenchRequest
from vattention.config import EngineConfig
from vattention.engine.engine import LLMEngine
from vattention.sampling_params import SamplingParams

UNIQUE_TOKENS = 30
OUTPUT_TOKENS = 30
"""A sentence to translate and its translation, as in WMT16."""

LIVE_SLOTS = 16
LIVE_VOCAB = 1000
"""Token ids below this are valid in every model."""


def translations(prefix_tokens: int, count: int, vocab_size: int, seed: int) -> list[BenchRequest]:
    """Requests with one prefix of so many tokens and sentences of their own; token ids are drawn."""
    rng = np.random.default_rng([seed, prefix_tokens])
    prefix = rng.integers(0, vocab_size, prefix_tokens).tolist()
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=OUTPUT_TOKENS)
    return [
        BenchRequest(prefix + rng.integers(0, vocab_size, UNIQUE_TOKENS).tolist(), params) for _ in range(count)
    ]


def with_prefix_cache(variant: Variant) -> Variant:
    return replace(
        variant,
        name=f"{variant.name}, prefix cache",
        options={**variant.options, "enable_prefix_caching": True},
    )


def simulated_s(scenario: Scenario, variant: Variant, prefix_tokens: int, seed: int) -> float:
    """Simulated time to serve the scenario's number of translations that come all at once."""
    device = SimulatedDevice(scenario.model, scenario.device)
    with simulated_engine(scenario, variant, device) as (engine, _):
        requests = translations(prefix_tokens, scenario.num_requests, VOCAB_SIZE, seed)
        for index, request in enumerate(requests):
            engine.add_request(str(index), {"prompt_token_ids": request.prompt_token_ids}, request.params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.error is not None:
                    raise output.error
    return device.now_s


def live_speed_ups(
    model: str, prefixes: Sequence[int], *, count: int, repeats: int, seed: int
) -> dict[int, tuple[float, float, float]]:
    """How many times faster a real model serves `count` translations with the prefix cache than without.

    Both are measured in turns, each time with an empty cache.

    Returns:
        By tokens of the prefix: the median of the pairs' quotients, the least and the most.
    """
    config = EngineConfig(
        model=model, max_model_len=max(prefixes) + UNIQUE_TOKENS + OUTPUT_TOKENS, max_num_seqs=LIVE_SLOTS
    )
    found = {}
    with ExitStack() as stack:
        plain, caching = (
            stack.enter_context(closing(LLMEngine.from_config(replace(config, enable_prefix_caching=caches))))
            for caches in (False, True)
        )
        for num_tokens in prefixes:
            work = translations(num_tokens, count, LIVE_VOCAB, seed)
            for engine in (plain, caching):
                warm_up(engine, work)
            quotients = [_elapsed_s(plain, work) / _elapsed_s(caching, work) for _ in range(repeats)]
            found[num_tokens] = (median(quotients), min(quotients), max(quotients))
    return found


def _elapsed_s(engine: LLMEngine, work: Sequence[BenchRequest]) -> float:
    engine.manager.drop_warm()
    return measure(engine, work).elapsed_s
