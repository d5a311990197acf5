"""A small load on a real model: the managers at work, not simulated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing

import numpy as np

from vattention.bench.memory.meter import Meter
from vattention.bench.memory.prefix import LIVE_VOCAB
from vattention.bench.memory.trace import Lengths
from vattention.bench.memory.variants import NOTHING_CACHED, Variant
from vattention.config import EngineConfig
from vattention.core import Prompt
from vattention.engine.engine import LLMEngine
from vattention.sampling_params import SamplingParams

LIVE_PROMPTS = Lengths(40, 1.0, 255)
LIVE_OUTPUTS = Lengths(85, 0.9, 255)
"""A quarter of ShareGPT's, so that a processor serves them in seconds."""

MAX_MODEL_LEN = 512
LIVE_LIMIT = "64MiB"
"""For keys and values: too little for all requests at once under managers that reserve."""

BEAM_PROMPTS: Sequence[Prompt] = (
    "The lighthouse keeper found a bottle on the beach, and in it a letter. It was forty years old, and it began:",
    "Plants turn light, water and carbon dioxide into sugar and oxygen. This takes two stages. In the first,",
    "Two weeks of travel through Italy by train could look like this. The journey begins in Milan, from where",
)
BEAM_TOKENS = 128


def live_usage(model: str, variant: Variant, *, count: int, seed: int) -> tuple[Meter, float]:
    """Serve `count` requests that come all at once; returns the accounts' averages and tokens generated per second.

    Averages are over real time, until the last request is done.
    """
    rng = np.random.default_rng([seed, count])
    prompts, outputs = LIVE_PROMPTS.draw(rng, count), LIVE_OUTPUTS.draw(rng, count)
    config = EngineConfig(
        model=model,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=count,
        kv_memory=LIVE_LIMIT,
        **{**NOTHING_CACHED, **variant.options},
    )
    engine = LLMEngine.from_config(config)
    meter = Meter()
    try:
        for index, (prompt, output) in enumerate(zip(prompts.tolist(), outputs.tolist(), strict=True)):
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=output)
            tokens = rng.integers(0, LIVE_VOCAB, prompt).tolist()
            engine.add_request(str(index), {"prompt_token_ids": tokens}, params)
        started = before = time.perf_counter()
        while engine.has_unfinished_requests():
            for result in engine.step():
                if result.error is not None:
                    raise result.error
            now, statistics = time.perf_counter(), engine.statistics()
            meter.add(
                statistics.accounts,
                now - before,
                held_nbytes=statistics.accounts.mapped_nbytes,
                num_batched=statistics.num_running,
                num_waiting=statistics.num_waiting,
            )
            before = now
        return meter, int(outputs.sum()) / (time.perf_counter() - started)
    finally:
        engine.close()


def live_beams(model: str, variant: Variant, width: int) -> float:
    """Search with so many beams from each of `BEAM_PROMPTS`, one after the other; returns the share of memory that
    sharing saves, on average over forwards.
    """
    config = EngineConfig(
        model=model, max_model_len=MAX_MODEL_LEN, max_num_seqs=width, **{**NOTHING_CACHED, **variant.options}
    )
    params = SamplingParams(n=width, use_beam_search=True, temperature=0, ignore_eos=True, max_tokens=BEAM_TOKENS)
    meter = Meter()
    with closing(LLMEngine.from_config(config)) as engine:
        for index, prompt in enumerate(BEAM_PROMPTS):
            engine.add_request(str(index), prompt, params)
            while engine.has_unfinished_requests():
                for result in engine.step():
                    if result.error is not None:
                        raise result.error
                accounts = engine.statistics().accounts
                meter.add(accounts, 1.0, held_nbytes=accounts.mapped_nbytes, num_batched=width, num_waiting=0)
    return meter.saved_share
