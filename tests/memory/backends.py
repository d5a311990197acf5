"""The drivers under test, and how to look at what they did from outside."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from tests.memory.fake_cuda import GRANULARITY, FakeCuda, FakeTorch
from vattention.memory.cuda import CudaDriver
from vattention.memory.driver import Driver, IntArray
from vattention.memory.host import HostDriver
from vattention.memory.libc import bytes_at
from vattention.memory.null import NullDriver
from vattention.memory.tensor import as_tensor


@dataclass
class Backend:
    """A driver and its surroundings.

    Attributes:
        used_nbytes: physical memory behind it as the system sees it, or None where that cannot be told exactly.
        fake: the API behind a fake GPU's driver.
    """

    driver: Driver
    used_nbytes: Callable[[], int] | None
    fake: FakeCuda | None = None

    @property
    def page(self) -> int:
        return self.driver.page_nbytes

    @property
    def holds_content(self) -> bool:
        return self.driver.capabilities.addressable

    def addresses(self, start: int, indices: Sequence[int]) -> IntArray:
        return start + np.array(indices, np.int64) * self.page

    def write(self, addresses: IntArray, values: Sequence[int]) -> None:
        """Fill the first and last bytes of each page with a value."""
        for address, value in zip(addresses.tolist(), values, strict=True):
            for at in (address, address + self.page - 8) if self.holds_content else ():
                self._bytes(at).fill_(value)

    def read(self, addresses: IntArray) -> list[int]:
        """The value each page was filled with; -1 for a page that differs at its two ends."""
        values = []
        for address in addresses.tolist():
            seen = {x for at in (address, address + self.page - 8) for x in self._bytes(at).tolist()}
            values.append(seen.pop() if len(seen) == 1 else -1)
        return values

    def _bytes(self, address: int) -> torch.Tensor:
        if self.fake is not None:
            return torch.from_numpy(bytes_at(address, 8))
        return as_tensor(address, 8, device=self.driver.capabilities.device, owner=None)

    def check_used(self, num_pages: int) -> None:
        if self.used_nbytes is not None:
            assert self.used_nbytes() == num_pages * self.page

    def mapped(self, start: int, indices: Sequence[int]) -> tuple[IntArray, IntArray]:
        """Addresses with new pages behind them, and the pages' handles."""
        addresses = self.addresses(start, indices)
        handles = self.driver.create(addresses)
        self.driver.map(addresses, handles)
        self.driver.set_access(addresses)
        return addresses, handles


def _host(page_nbytes: int | None = None) -> Backend:
    driver = HostDriver(page_nbytes)
    return Backend(driver, lambda: os.fstat(driver._file.fd).st_blocks * 512)


def _host_without_populate() -> Backend:
    backend = _host()
    assert isinstance(backend.driver, HostDriver)
    backend.driver._file._populates = False
    return backend


def _null(recycles: bool) -> Backend:
    driver = NullDriver(recycles=recycles)

    def used() -> int:
        info = driver.memory_info()
        return info.total_nbytes - info.available_nbytes

    return Backend(driver, used)


def _fake_cuda() -> Backend:
    fake = FakeCuda(48 * GRANULARITY)
    return Backend(CudaDriver(api=fake, torch_side=FakeTorch()), lambda: fake.used_nbytes, fake)


BACKENDS: dict[str, Callable[[], Backend]] = {
    "host": _host,
    "host-64KiB": lambda: _host(64 * 2**10),
    "host-no-populate": _host_without_populate,
    "null": lambda: _null(recycles=True),
    "null-no-recycling": lambda: _null(recycles=False),
    "cuda-fake": _fake_cuda,
}
if torch.cuda.is_available():
    BACKENDS["cuda"] = lambda: Backend(CudaDriver(), None)


def opened(name: str, undo: ExitStack) -> Backend:
    """A backend that is closed with `undo`."""
    backend = BACKENDS[name]()
    undo.callback(backend.driver.close)
    return backend
