"""Capturing on a GPU where there is one; elsewhere that torch is called as it wants to be."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vattention.model.cuda_graphs import CudaCapture

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

REAL_GRAPH = torch.cuda.graph


class FakeTorchCuda:
    """`torch.cuda`, which keeps a diary.

    Attributes:
        underway: pools that captures take from; those of captures that were broken off remain, as in torch 2.11.
        is_random: random numbers can be drawn: no capture was broken off since one last ended well.
        references: by pool, the graphs that it has memory for.
    """

    def __init__(self, device: int = 0) -> None:
        self.diary: list[str] = []
        self.num_pools = 0
        self.underway: list[tuple[int, int]] = []
        self.is_random = True
        self.references: dict[tuple[int, int], int] = {}
        self._device = device

    def current_device(self) -> int:
        return self._device

    def end_allocate(self, device: int, pool: tuple[int, int]) -> None:
        """`torch._C._cuda_endAllocateToPool`."""
        assert device == self._device
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, device: int, pool: tuple[int, int]) -> None:
        """`torch._C._cuda_releasePool`."""
        assert device == self._device
        assert self.references[pool] > 0
        self.references[pool] -= 1

    def Stream(self, device: torch.device) -> Any:  # noqa: N802 (torch's name)
        return self._stream("side")

    def current_stream(self, device: torch.device) -> Any:
        return self._stream("current")

    def _stream(self, name: str) -> Any:
        return SimpleNamespace(
            name=name, wait_stream=lambda other: self.diary.append(f"{name} waits for {other.name}")
        )

    def graph_pool_handle(self) -> tuple[int, int]:
        self.num_pools += 1
        self.diary.append("pool")
        return (0, self.num_pools)

    def CUDAGraph(self) -> Any:  # noqa: N802
        return SimpleNamespace(replay=lambda: self.diary.append("replay"))

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.diary.append(f"on {stream.name}")
        try:
            yield
        finally:
            self.diary.append("off")

    @contextmanager
    def graph(self, *arguments: Any, **keywords: Any) -> Iterator[None]:
        assert not torch.is_inference_mode_enabled(), "what random numbers need would be for inference alone"
        if self.underway:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        bound = inspect.signature(REAL_GRAPH.__init__).bind(self, *arguments, **keywords).arguments
        pool = bound.get("pool") or (1, 0)
        assert pool in ((1, 0), (0, self.num_pools))
        assert bound["stream"].name == "side"
        self.diary.append(f"capture {bound['capture_error_mode']}")
        self.references[pool] = self.references.get(pool, 0) + 1
        self.underway.append(pool)
        self.is_random = False
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        self.underway.remove(pool)
        self.is_random = True
        self.diary.append("captured")

    def synchronize(self, device: torch.device) -> None:
        self.diary.append("synchronize")

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 30, 100


def faked(monkeypatch: pytest.MonkeyPatch, device: int = 0) -> FakeTorchCuda:
    fake = FakeTorchCuda(device)
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_allocate, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", fake.release, raising=False)
    return fake


def test_warm_ups_come_first_and_other_threads_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = faked(monkeypatch)
    capture = CudaCapture(torch.device("cuda", 1))
    for _ in range(2):
        capture(lambda: fake.diary.append("run"))()
    assert capture.in_use_nbytes == 70
    once = ["side waits for current", "on side", "run", "run", "off", "current waits for side"]
    once += ["on current", "capture thread_local", "run", "captured", "off", "replay"]
    assert fake.diary == ["pool", *once, *once, "synchronize"]


def test_a_capture_that_is_broken_off_leaves_its_stream_and_its_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = faked(monkeypatch, 1)
    capture = CudaCapture(torch.device("cuda", 1))
    capture(lambda: None)

    def asks_the_device() -> None:
        if fake.underway:
            raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="previous error") as caught:
        capture(asks_the_device)
    assert str(caught.value.__context__) == "not permitted"
    assert fake.diary.count("off") == sum(entry.startswith("on ") for entry in fake.diary)
    assert not fake.underway
    assert fake.is_random
    # The graph before is the only one that has memory there.
    assert fake.references[0, 1] == 1
    capture(lambda: None)
    assert fake.references[0, 2] == 1


def test_a_function_that_fails_without_the_device_ends_its_capture_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = faked(monkeypatch)
    capture = CudaCapture(torch.device("cuda", 0))

    def fails() -> None:
        if fake.underway:
            fake.end_allocate(0, (0, 1))  # as torch 2.12 does, whatever broke the capture off
            raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="previous error"):
        capture(fails)
    assert fake.references[0, 1] == 1
    assert fake.is_random


def test_a_broken_device_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = faked(monkeypatch)
    capture = CudaCapture(torch.device("cuda", 0))

    def breaks() -> None:
        if fake.underway:
            fake.underway.append((7, 7))
            raise RuntimeError("illegal access")

    with pytest.raises(RuntimeError, match="previous error") as caught:
        capture(breaks)
    assert str(caught.value.__context__) == "illegal access"


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=["inference", "no gradients", "gradients"]
)
def test_all_runs_are_in_the_callers_mode(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch)
    capture = CudaCapture(torch.device("cuda", 0))
    seen = set()
    with mode():
        capture(lambda: seen.add((torch.is_inference_mode_enabled(), torch.is_grad_enabled())))
        assert seen == {(torch.is_inference_mode_enabled(), torch.is_grad_enabled())}


@needs_gpu
def test_replays_read_what_tensors_hold_by_then() -> None:
    capture = CudaCapture(torch.device("cuda", torch.cuda.current_device()))
    x, y = (torch.zeros(1000, device="cuda") for _ in "xy")

    def scale(factor: int) -> None:
        y.copy_(x.exp() * factor)

    replays = [capture(partial(scale, factor)) for factor in (2, 3)]
    for value in (0.0, 1.0):
        x.fill_(value)
        for factor, replay in zip((2, 3), replays, strict=True):
            replay()
            torch.testing.assert_close(y, torch.full_like(y, value).exp() * factor)


@needs_gpu
def test_after_a_failed_capture_others_work() -> None:
    capture = CudaCapture(torch.device("cuda", torch.cuda.current_device()))
    x, y = (torch.ones(1000, device="cuda") for _ in "xy")
    before = capture(lambda: y.copy_(x + 1))
    with pytest.raises(RuntimeError):
        capture(lambda: y.fill_(x.sum().item()))
    before()
    assert y[0] == 2
    torch.cuda.empty_cache()
    assert torch.rand(4, device="cuda").isfinite().all()
    capture(lambda: y.copy_(x + 2))()
    assert y[0] == 3
