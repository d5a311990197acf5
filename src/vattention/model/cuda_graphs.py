"""CUDA graphs: what a function launches, written down once and launched again by one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch

Replay = Callable[[], None]
"""Computes what was captured once more, from what the tensors that it reads hold by now."""


class Capture(Protocol):
    """Makes functions of tensors into something to replay."""

    def __call__(self, function: Callable[[], object]) -> Replay:
        """Run `function`, which leaves its results in tensors of its caller's, and write down what it launches.

        It may be run several times, and its work may be done by none of them; whatever it reads and writes must
        stay where it is for as long as the replay is used.

        Raises:
            RuntimeError: it does something that cannot be replayed, such as waiting for the device; or the device
                has no memory left.
        """
        ...

    @property
    def in_use_nbytes(self) -> int:
        """Memory of the device that is taken, by whomever."""
        ...


_NUM_WARM_UPS = 2
"""Runs before a function is captured: libraries choose kernels, compile them and take their workspaces."""


class CudaCapture:
    """Captures on a stream of its own. All graphs take their memory from one pool, where each uses again what the
    others have left: no two of them may be replayed at the same time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []
        """Captures that were broken off: torch's allocator goes on asking them whether an allocation is theirs."""

    def __call__(self, function: Callable[[], object]) -> Replay:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_NUM_WARM_UPS):
                    function()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with self._writing_down(graph, self._pool):
                    function()
            except BaseException:
                self._failed.append(graph)
                self._abandon()
                raise
        replay: Replay = graph.replay
        return replay

    @contextmanager
    def _writing_down(self, graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
        """Capture the block in the caller's modes; a `pool` of None is one for this graph alone."""
        infers, has_gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        with (
            # A first capture makes tensors for random numbers, to which later ones write, whatever their modes.
            torch.inference_mode(False),
            # This brings the current stream back, which a capture that is broken off does not.
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            # Only this thread is held to what a capture allows: the mapper goes on beside it.
            torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
            torch.inference_mode(infers),
            torch.set_grad_enabled(has_gradients),
        ):
            yield

    def _abandon(self) -> None:
        """Leave a capture that was broken off.

        torch 2.11 goes on as if it were under way: emptying the cache, which a capture begins with, and drawing
        random numbers are errors then, and whoever runs out of memory gets none that is only kept.
        """
        index = torch.cuda.current_device()
        # torch did so itself: later versions always, maybe without these functions, 2.11 where no work was refused.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
        # A pool that was being taken from cannot be used again.
        self._pool = torch.cuda.graph_pool_handle()
        # Random numbers come back with the next capture that ends well. The device may be beyond help, of which the
        # first error tells.
        with suppress(RuntimeError), self._writing_down(torch.cuda.CUDAGraph(), None):
            torch.zeros(1, device=self._device)

    @property
    def in_use_nbytes(self) -> int:
        torch.cuda.synchronize(self._device)
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free
