from __future__ import annotations

import numpy as np
import pytest
import torch

from vattention.bench.memory.pages import Lengths, block_share, layout_of, page_share, worst_nbytes
from vattention.bench.memory.shapes import GEMMA_3_270M, LLAMA_3_8B, OPT_13B, YI_6B, YI_34B, ModelShape
from vattention.config import EngineConfig
from vattention.kv.build import create_manager

RUNNING = [3, 100, 100, 700, 1023]


@pytest.mark.parametrize("model", [LLAMA_3_8B, GEMMA_3_270M], ids=lambda model: model.name)
@pytest.mark.parametrize("kv_layout", ["per-layer", "sliced"])
@pytest.mark.parametrize("page_size", [4096, 2**16])
def test_the_arithmetic_is_what_the_manager_does(model: ModelShape, kv_layout: str, page_size: int) -> None:
    config = EngineConfig(
        model=model.name,
        max_num_seqs=len(RUNNING),
        kv_memory="8GiB",
        page_size=page_size,
        kv_layout=kv_layout,  # type: ignore[arg-type]
    )
    manager = create_manager(config, model.specs, dtype=torch.bfloat16, device="meta", max_len=2048)
    for length in RUNNING:
        slot = manager.take([0] * length).slot
        manager.ensure(slot, 0, length - 1)
        manager.ensure(slot, length - 1, length)
    accounts = manager.accounts()
    manager.close()
    share = page_share(Lengths.of([RUNNING]), layout_of(model, page_size, sliced=kv_layout == "sliced"))
    assert share == pytest.approx(accounts.token_nbytes / accounts.live_nbytes)


def test_a_token_ahead_takes_its_page() -> None:
    layout = layout_of(LLAMA_3_8B, 2**21, sliced=True)
    exactly_full = Lengths.of([[16], [32]])
    assert page_share(exactly_full, layout) == 1
    assert page_share(exactly_full, layout, ahead=1) == pytest.approx(48 / (32 + 48))


def test_blocks_waste_their_ends() -> None:
    assert block_share(Lengths.of([[1, 17], [16]]), 16) == pytest.approx(34 / 64)
    assert block_share(Lengths.of([[1, 17], [16]]), 1) == 1


def test_lengths_are_counted() -> None:
    running = Lengths.of([[5, 7], [5]])
    assert (running.lengths.tolist(), running.counts.tolist()) == ([5, 7], [2, 1])
    assert running.lengths.dtype == np.int64


def test_worst_waste_is_the_vattention_papers() -> None:
    # Section 7.4: 4 to 15 MB at 64 KB, and 32 to 128 tokens a page, over TP-1 and TP-2.
    assert worst_nbytes(layout_of(YI_6B, 2**16, sliced=False)) == 4 * 2**20
    assert 2 * worst_nbytes(layout_of(YI_34B, 2**16, sliced=False)) == 15 * 2**20
    assert layout_of(YI_34B, 2**16, sliced=False).groups[0].step == 32
    assert layout_of(OPT_13B, 2**21, sliced=True).groups[0].step == 2
