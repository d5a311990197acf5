"""After a thousand requests the system has every byte back, and the process has not grown."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

from tests.engine.test_parity import engine_for
from tests.engine.test_scheduler import run
from tests.model.architectures import ARCHITECTURES
from vattention.engine.engine import LLMEngine
from vattention.kv.virtual import VirtualManager
from vattention.memory.host import HostDriver
from vattention.sampling_params import SamplingParams


def resident(kind: str) -> int:
    """Bytes of "RssAnon" or "RssShmem" of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def blocks(engine: LLMEngine) -> int:
    """Blocks of the cache's memory file that the system holds."""
    assert isinstance(engine.manager, VirtualManager)
    driver = engine.manager._driver
    assert isinstance(driver, HostDriver)
    descriptor = driver.export(0)
    try:
        return os.fstat(descriptor).st_blocks
    finally:
        os.close(descriptor)


def serve(engine: LLMEngine, first: int, last: int) -> None:
    rng = random.Random(first)
    for index in range(first, last):
        prompt = [rng.randrange(3, 120) for _ in range(rng.randint(1, 60))]
        params = SamplingParams(temperature=0.8, max_tokens=rng.randint(1, 16), ignore_eos=True)
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    run(engine)


def test_memory_goes_back_to_the_system() -> None:
    engine = engine_for(ARCHITECTURES["gemma3"](), max_num_seqs=32)
    begun = blocks(engine), resident("RssShmem")
    serve(engine, 0, 100)
    assert blocks(engine) > begun[0]
    gc.collect()
    after_100 = resident("RssAnon")
    for first in range(100, 1000, 100):
        serve(engine, first, first + 100)
    gc.collect()
    assert resident("RssAnon") < after_100 * 1.01
    engine.manager.drop_warm()
    assert (blocks(engine), resident("RssShmem")) == begun
    engine.close()
