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
    """`torch.cuda`, which keeps a diary."""

    def __init__(self) -> None:
        self.diary: list[str] = []
        self.num_pools = 0

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
        bound = inspect.signature(REAL_GRAPH.__init__).bind(self, *arguments, **keywords).arguments
        assert bound["pool"] == (0, self.num_pools)
        assert bound["stream"].name == "side"
        self.diary.append(f"capture {bound['capture_error_mode']}")
        yield
        self.diary.append("captured")

    def synchronize(self, device: torch.device) -> None:
        self.diary.append("synchronize")

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 30, 100


def test_warm_ups_come_first_and_other_threads_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTorchCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    capture = CudaCapture(torch.device("cuda", 1))
    for _ in range(2):
        capture(lambda: fake.diary.append("run"))()
    assert capture.in_use_nbytes == 70
    once = ["side waits for current", "on side", "run", "run", "off", "current waits for side"]
    once += ["on current", "capture thread_local", "run", "captured", "off", "replay"]
    assert fake.diary == ["pool", *once, *once, "synchronize"]


def test_a_capture_that_is_broken_off_leaves_its_stream_and_its_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTorchCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    capture = CudaCapture(torch.device("cuda", 0))

    def asks_the_device() -> None:
        if any(entry.startswith("capture ") for entry in fake.diary):
            raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        capture(asks_the_device)
    assert fake.diary[-2:] == ["off", "pool"]
    fake.diary.clear()
    capture(lambda: None)
    assert "captured" in fake.diary


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
    capture(lambda: y.copy_(x + 2))()
    assert y[0] == 3
