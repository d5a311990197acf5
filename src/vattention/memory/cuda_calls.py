"""Calls into CUDA's driver API: errors as exceptions, and the context they need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from vattention.errors import ConfigError, DriverError, OutOfMemoryError


def load_bindings() -> ModuleType:
    """The driver API's Python bindings, with torch's context made first so that both use the same one.

    Raises:
        ConfigError: the bindings are not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ConfigError(
            "a KV cache in a GPU's memory needs cuda-bindings; install it with: pip install 'vattention[gpu]'"
        ) from error
    bindings: ModuleType = driver
    return bindings


class CudaCalls:
    """The driver API on one device.

    Args:
        api: `cuda.bindings.driver`, or something that behaves like it.

    Raises:
        ConfigError: there is no such device, or CUDA does not work here.
    """

    def __init__(self, device_index: int, api: Any) -> None:
        self.api = api
        try:
            self("cuInit", 0)
            self.device = self("cuDeviceGet", device_index)
            self._context = self("cuDevicePrimaryCtxRetain", self.device)
        except (DriverError, RuntimeError) as error:  # the bindings raise RuntimeError where libcuda is missing
            raise ConfigError(f"cuda:{device_index} cannot be used: {error}") from error

    def __call__(self, name: str, *arguments: object, nbytes: int = 0) -> Any:
        """Call a function of the API by name and return its result, if it has one.

        Args:
            nbytes: what the call asks for, for the error if that is not to be had.
        """
        code, *results = getattr(self.api, name)(*arguments)
        if code != self.api.CUresult.CUDA_SUCCESS:
            raise self._error(name, code, nbytes)
        return results[0] if len(results) == 1 else results

    @contextmanager
    def context(self) -> Iterator[None]:
        """Make the device's context the calling thread's, and then the one before again."""
        self("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self("cuCtxPopCurrent")

    def attribute(self, name: str) -> int:
        """A property of the device, by the end of its name in CUdevice_attribute."""
        which = getattr(self.api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self("cuDeviceGetAttribute", which, self.device))

    def memory(self) -> tuple[int, int]:
        """Free and total memory of the device, in bytes."""
        free, total = self("cuMemGetInfo")
        return int(free), int(total)

    def let_go(self) -> None:
        """Give the context back; nothing may be called any more."""
        self("cuDevicePrimaryCtxRelease", self.device)

    def _error(self, name: str, code: Any, nbytes: int) -> DriverError | OutOfMemoryError:
        if code == self.api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            asked, free, _ = self.api.cuMemGetInfo()
            available = int(free) if asked == self.api.CUresult.CUDA_SUCCESS else 0
            return OutOfMemoryError(
                nbytes, available, f"the GPU has no memory for the KV cache ({name}); lower kv_memory"
            )
        _, text = self.api.cuGetErrorString(code)
        return DriverError(name, int(code), text.decode() if text else "unknown error")


_COMMON_POOL = (0, 0)
"""Of torch's memory, the pool of all that no other was named for."""


class TorchSide:
    """What torch does on a device beside us.

    Args:
        device_index: as torch counts devices.
    """

    def __init__(self, device_index: int) -> None:
        self._index = device_index

    def claim_context(self) -> None:
        """Let torch make the device's primary context, which it then sets up the way it wants.

        Raises:
            ConfigError: torch sees no such device.
        """
        import torch

        if self._index >= torch.cuda.device_count():
            raise ConfigError(
                f"torch sees {torch.cuda.device_count()} CUDA devices, so there is no cuda:{self._index}"
            )
        torch.cuda.synchronize(self._index)

    def stream(self) -> int:
        """The stream on which torch launches what the calling thread computes."""
        import torch

        return int(torch.cuda.current_stream(self._index).cuda_stream)

    def idle_nbytes(self) -> int:
        """Memory that torch holds without a tensor in it, without CUDA graphs' pools, which only they can use."""
        import torch

        return sum(
            segment["total_size"] - segment["allocated_size"]
            for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
            if segment["device"] == self._index and tuple(segment["segment_pool_id"]) == _COMMON_POOL
        )
