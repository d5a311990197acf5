"""How the driver for GPUs calls CUDA, on a strict stand-in for it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from tests.memory.backends import Backend
from tests.memory.fake_cuda import GRANULARITY, OUT_OF_MEMORY, STREAM, FakeCuda, FakeTorch
from vattention.errors import ConfigError, DriverError, OutOfMemoryError
from vattention.memory.cuda import CudaDriver
from vattention.memory.cuda_calls import TorchSide
from vattention.memory.driver import IntArray
from vattention.memory.pool import PagePool
from vattention.memory.region import Region


class Bench:
    def __init__(self) -> None:
        self.fake, self.torch = FakeCuda(16 * GRANULARITY), FakeTorch()
        self.driver = CudaDriver(api=self.fake, torch_side=self.torch)
        self.backend = Backend(self.driver, lambda: self.fake.used_nbytes, self.fake)
        self.start = self.driver.reserve(32 * GRANULARITY)

    def at(self, *indices: int) -> IntArray:
        return self.backend.addresses(self.start, indices)

    def state(self) -> tuple[object, ...]:
        return dict(self.fake.mapped), dict(self.fake.handles), dict(self.fake.ranges), list(self.fake.contexts)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_one_call_per_run_and_one_map_per_page(bench: Bench) -> None:
    addresses, _ = bench.backend.mapped(bench.start, [0, 1, 2, 6, 7, 20])
    assert bench.fake.calls["cuMemMap"] == 6
    assert bench.fake.calls["cuMemSetAccess"] == 3
    bench.driver.unmap(addresses)
    assert bench.fake.calls["cuMemUnmap"] == 3
    assert bench.fake.calls["cuEventSynchronize"] == 1


def test_unmapping_waits_for_the_callers_stream_alone(bench: Bench) -> None:
    addresses, _ = bench.backend.mapped(bench.start, [0])
    bench.driver.unmap(addresses)
    assert list(bench.fake.events.values()) == [STREAM]
    # The whole context is waited for at the end only: a thread may be capturing a graph.
    assert "cuCtxSynchronize" not in bench.fake.calls
    fake = bench.fake
    bench.driver.close()
    assert fake.calls["cuCtxSynchronize"] == 1
    assert not fake.events


def test_handles_beyond_63_bits_come_back_as_they_were(bench: Bench) -> None:
    _, handles = bench.backend.mapped(bench.start, [0])
    assert handles[0] < 0
    assert list(bench.fake.handles) == [2**63]
    bench.driver.unmap(bench.at(0))
    bench.driver.release(handles)
    assert not bench.fake.handles


def test_the_callers_context_is_left_as_it_was(bench: Bench) -> None:
    bench.backend.mapped(bench.start, [0, 1])
    bench.fake.fail("cuMemUnmap", 1)
    with pytest.raises(DriverError):
        bench.driver.unmap(bench.at(0, 1))
    assert bench.fake.contexts == []


def test_some_memory_is_left_for_forward_passes(bench: Bench) -> None:
    reserve = 16 * GRANULARITY // 20
    info = bench.driver.memory_info()
    assert (info.available_nbytes, info.total_nbytes) == (16 * GRANULARITY - reserve, 16 * GRANULARITY)
    assert info.shortfall_nbytes == 0
    bench.backend.mapped(bench.start, range(16))
    info = bench.driver.memory_info()
    assert (info.available_nbytes, info.shortfall_nbytes) == (0, reserve)


def test_what_torch_keeps_is_left_for_forward_passes_already(bench: Bench) -> None:
    bench.torch.kept_nbytes = 1000
    reserve = 16 * GRANULARITY // 20 - 1000
    assert bench.driver.memory_info().available_nbytes == 16 * GRANULARITY - reserve
    bench.torch.kept_nbytes = 2 * GRANULARITY
    assert bench.driver.memory_info().available_nbytes == 16 * GRANULARITY


def test_what_graphs_keep_is_not_for_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def segment(device: int, pool: tuple[int, int], idle_nbytes: int) -> dict[str, object]:
        sizes = {"total_size": 1000 + idle_nbytes, "allocated_size": 1000}
        return {"device": device, "segment_pool_id": pool, **sizes}

    segments = [segment(1, (0, 0), 1), segment(1, (0, 0), 20), segment(1, (0, 1), 300), segment(0, (0, 0), 4000)]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3000 + 321)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3000)
    assert TorchSide(1).idle_nbytes() == 21


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_what_torch_keeps_is_found() -> None:
    side = TorchSide(torch.cuda.current_device())
    torch.cuda.empty_cache()
    before = side.idle_nbytes()
    tensor = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    del tensor
    assert side.idle_nbytes() >= before + (64 << 20)
    torch.cuda.empty_cache()


def test_shortage_says_what_there_was(bench: Bench) -> None:
    bench.backend.mapped(bench.start, range(14))
    before = bench.state()
    with pytest.raises(OutOfMemoryError, match="kv_memory") as caught:
        bench.driver.create(bench.at(14, 15, 16, 17))
    assert caught.value.needed_nbytes == 4 * GRANULARITY
    assert bench.state() == before


@pytest.mark.parametrize("code", [None, OUT_OF_MEMORY], ids=["error", "shortage"])
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize(
    "name",
    [
        "cuMemCreate",
        "cuMemMap",
        "cuMemSetAccess",
        "cuMemUnmap",
        "cuMemRelease",
        "cuEventRecord",
        "cuEventSynchronize",
    ],
)
def test_a_call_that_fails_half_way_is_undone(bench: Bench, name: str, nth: int, code: object) -> None:
    pool = PagePool(bench.driver, 16 * GRANULARITY)
    region = Region(bench.driver, pool, 16 * GRANULARITY)
    addresses = region.address + np.arange(16) * GRANULARITY
    held = np.array([0, 2, 4])
    region.commit(held)
    bench.backend.write(addresses[held], [1, 2, 3])
    pool.limit_nbytes = 6 * GRANULARITY

    def accounts() -> tuple[object, ...]:
        return region.pages(np.arange(16)).tolist(), pool.in_use_nbytes, region.mapped_nbytes

    def attempt(act: str) -> None:
        bench.fake.heal()
        bench.fake.fail(name, nth, *([] if code is None else [code]))
        before, mapped = accounts(), {a: h for a, (h, _) in bench.fake.mapped.items()}
        try:
            region.commit(np.array([6, 8, 10])) if act == "commit" else region.unmap(held)
        except (DriverError, OutOfMemoryError):
            assert accounts() == before
            assert {a: h for a, (h, _) in bench.fake.mapped.items()} == mapped
            bench.fake.heal()
            region.commit(np.array([6, 8, 10])) if act == "commit" else region.unmap(held)
        bench.fake.heal()

    attempt("commit")
    assert bench.backend.read(addresses[held]) == [1, 2, 3]
    pool.limit_nbytes = 0
    attempt("unmap")
    region.unmap(np.array([6, 8, 10]))
    pool.release_idle()
    bench.backend.check_used(0)


def test_releasing_that_fails_half_way_is_finished_by_the_next_call(bench: Bench) -> None:
    handles = bench.driver.create(bench.at(0, 1, 2, 3))
    bench.fake.fail("cuMemRelease", 2)
    bench.driver.release(handles[:3])
    assert len(bench.fake.handles) == 3
    bench.fake.fail("cuMemRelease", 1)
    with pytest.raises(DriverError, match="cuMemRelease"):
        bench.driver.release(handles[3:])
    bench.driver.release(handles[3:])
    assert not bench.fake.handles


def test_errors_carry_the_call_and_its_code(bench: Bench) -> None:
    bench.fake.fail("cuMemAddressReserve", 1)
    with pytest.raises(DriverError) as caught:
        bench.driver.reserve(GRANULARITY)
    assert caught.value.operation == "cuMemAddressReserve"
    assert caught.value.code == 999
    assert "CUDA_ERROR_UNKNOWN" in str(caught.value)


@pytest.mark.parametrize("page_nbytes", [0, 4096, 3 * GRANULARITY, -GRANULARITY])
def test_page_sizes_are_the_granularity_times_a_power_of_two(page_nbytes: int) -> None:
    fake = FakeCuda()
    with pytest.raises(ConfigError, match="power of two"):
        CudaDriver(0, page_nbytes, fake)
    assert fake.retained == 0
    assert CudaDriver(0, 4 * GRANULARITY, fake).page_nbytes == 4 * GRANULARITY


def test_devices_that_cannot_are_refused() -> None:
    fake = FakeCuda(supported=False)
    with pytest.raises(ConfigError, match="no virtual memory management"):
        CudaDriver(api=fake)
    assert fake.retained == 0
    with pytest.raises(ConfigError, match="cuda:3 cannot be used"):
        CudaDriver(3, api=FakeCuda())


def test_missing_bindings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ConfigError, match="pip install"):
        CudaDriver()


def test_a_forgotten_driver_gives_its_memory_back(bench: Bench) -> None:
    bench.backend.mapped(bench.start, [0, 1, 5])
    fake = bench.fake
    del bench.backend, bench.driver
    assert not fake.handles
    assert not fake.ranges
    assert fake.retained == 0
