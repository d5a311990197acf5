from __future__ import annotations

import numpy as np
import pytest
import torch

from vattention.bench.memory.beams import parents, search
from vattention.bench.memory.meter import Meter
from vattention.bench.memory.shapes import GEMMA_3_270M
from vattention.bench.memory.trace import ALPACA, draw_trace
from vattention.config import EngineConfig
from vattention.kv.build import create_manager

KINDS = ["paged", "virtual"]


def saved(kind: str, width: int) -> float:
    config = EngineConfig(
        model="x",
        max_num_seqs=8,
        kv_memory="1GiB",
        page_size="4KiB",
        kv=kind,  # type: ignore[arg-type]
    )
    manager = create_manager(config, GEMMA_3_270M.specs, dtype=torch.bfloat16, device="meta", max_len=2048)
    meter = Meter()
    search(manager, draw_trace(ALPACA, count=3, requests_per_s=1, seed=0), width, 0, meter)
    assert manager.accounts().live_nbytes == 0
    assert manager.num_free_slots == 8
    manager.close()
    return meter.saved_share


@pytest.mark.parametrize("kind", KINDS)
def test_wider_beams_save_more(kind: str) -> None:
    shares = [saved(kind, width) for width in (1, 2, 4)]
    assert shares[0] == 0
    assert 0 < shares[1] < 1 / 2
    assert shares[1] < shares[2] < 3 / 4


def test_pages_save_at_least_what_blocks_do() -> None:
    assert saved("virtual", 4) >= saved("paged", 4)


def test_the_best_candidates_go_on() -> None:
    chosen, scores = parents(np.array([0.0, -100.0, -1.0]), np.random.default_rng(0))
    assert 1 not in chosen
    assert 0 in chosen
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    assert (scores < 0).all()


def test_at_first_there_is_one_beam() -> None:
    chosen, _ = parents(np.array([0.0, -np.inf, -np.inf]), np.random.default_rng(0))
    assert chosen.tolist() == [0, 0, 0]
