"""Every memory manager, as options, and the fake engine over it."""

from __future__ import annotations

from typing import Any

import torch

from tests.engine.fakes import PAGE, SPECS, FakeRunner, fake_engine
from vattention.config import EngineConfig
from vattention.engine.engine import LLMEngine
from vattention.kv.build import create_manager

MANAGERS: dict[str, dict[str, Any]] = {
    "virtual": {},
    "virtual sliced": {"kv_layout": "sliced"},
    "virtual, no prefix cache": {"enable_prefix_caching": False},
    "paged": {"kv": "paged", "block_size": 4},
    "paged, blocks of a token": {"kv": "paged", "block_size": 1},
    "paged, no prefix cache": {"kv": "paged", "enable_prefix_caching": False},
    "reserved, max": {"kv": "reserved"},
    "reserved, pow2": {"kv": "reserved", "reservation": "pow2"},
    "reserved, oracle": {"kv": "reserved", "reservation": "oracle"},
}


def engine_over(
    options: dict[str, Any], *, num_slots: int, limit_pages: int, budget: int, runner: FakeRunner | None = None
) -> LLMEngine:
    config = EngineConfig(model="fake", max_num_seqs=num_slots, kv_memory=limit_pages * PAGE, **options)
    manager = create_manager(config, SPECS, dtype=torch.float32, device="cpu", max_len=64)
    return fake_engine(num_slots=num_slots, max_num_batched_tokens=budget, manager=manager, runner=runner)
