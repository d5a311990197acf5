"""GPU libraries' kernels over the views that managers really give, in every layout; on a processor over fakes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.attention.subjects import SUBJECTS, Subject
from vattention.attention.kernel import RaggedBatch
from vattention.attention.registry import KERNELS
from vattention.config import EngineConfig
from vattention.core import AttentionSpec, Chunk
from vattention.kv.build import create_manager
from vattention.kv.manager import KVManager, PagedLayerView

SPECS = [AttentionSpec(8, 2, 64, 64, 0.125), AttentionSpec(8, 2, 64, 64, 0.125, window=30)]
CHUNKS = ((599, 1), (20, 13), (0, 5))
"""Per sequence (start, number of tokens)."""

LIBRARIES = {name: tried for name, tried in SUBJECTS.items() if "fake" in name or tried.device == "cuda"}


@pytest.fixture(params=["virtual", "reserved", "paged"])
def kv(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["per-layer", "sliced"])
def layout(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=sorted({tried.device for tried in LIBRARIES.values()}))
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def manager(kv: Any, layout: Any, device: str) -> Iterator[KVManager]:
    config = EngineConfig(model="none", kv=kv, kv_layout=layout, max_num_seqs=3, kv_memory="256MiB", block_size=256)
    where = "cuda:0" if device == "cuda" else device
    made = create_manager(config, SPECS, dtype=torch.bfloat16, device=where, max_len=700)
    yield made
    made.close()


def test_reads_what_was_written(manager: KVManager, device: str) -> None:
    chunks = []
    for start, count in CHUNKS:
        slot = manager.take((), max_tokens=700).slot
        manager.ensure(slot, 0, start + count)
        chunks.append(Chunk(slot, start, [0] * count, 0))
    batch = RaggedBatch.of(chunks, device)
    for layer, spec in enumerate(SPECS):
        view = manager.layer(layer)
        for chunk in chunks:
            keys, values = (torch.randn(chunk.end, 2, 64, device=device).bfloat16() for _ in "kv")
            positions = torch.arange(chunk.end, device=device)
            view.append(keys, values, torch.full_like(positions, chunk.slot), positions)
        query = torch.randn(len(batch.slots), 8, 64, device=device).bfloat16()
        plain = KERNELS["gathered" if isinstance(view, PagedLayerView) else "eager"]
        expected = plain(query, view, batch, spec, None)
        tried = [subject for subject in LIBRARIES.values() if _reads(subject, spec, view, device)]
        assert tried
        for subject in tried:
            result = subject.kernel(query, view, batch, spec, None)
            torch.testing.assert_close(result, expected, atol=3e-2, rtol=0)


def _reads(subject: Subject, spec: AttentionSpec, view: Any, device: str) -> bool:
    fits = subject.device == device and isinstance(view, subject.kernel.reads)
    return fits and subject.kernel.unsupported(spec, view) is None
