"""A driver that fails on demand, the way the contract allows."""

from __future__ import annotations

import errno

from vattention.errors import DriverError, OutOfMemoryError
from vattention.memory.driver import Capabilities, Driver, IntArray, MemoryInfo

METHODS = ("create", "map", "set_access", "unmap", "release")


class FaultyDriver:
    """Passes everything on, except that the nth call of one method fails.

    It fails before doing anything, or (create, map, set_access) after doing half and undoing it, as a driver does
    whose system call fails in the middle.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._method = ""
        self._countdown = 0
        self._half_way = False
        self._shortage = False

    def fail(self, method: str, nth: int, *, half_way: bool = False, shortage: bool = False) -> None:
        """Let the nth call from now on of `method` fail, with OutOfMemoryError if `shortage`."""
        self._method, self._countdown, self._half_way, self._shortage = method, nth, half_way, shortage

    def heal(self) -> None:
        self._countdown = 0

    @property
    def capabilities(self) -> Capabilities:
        return self.driver.capabilities

    @property
    def page_nbytes(self) -> int:
        return self.driver.page_nbytes

    def memory_info(self) -> MemoryInfo:
        return self.driver.memory_info()

    def reserve(self, nbytes: int) -> int:
        return self.driver.reserve(nbytes)

    def free(self, address: int) -> None:
        self.driver.free(address)

    def create(self, addresses: IntArray) -> IntArray:
        if self._is_due("create"):
            if self._half_way:
                self.driver.release(self.driver.create(addresses[: len(addresses) // 2]))
            self._fail()
        return self.driver.create(addresses)

    def map(self, addresses: IntArray, handles: IntArray) -> None:
        if self._is_due("map"):
            if self._half_way:
                half = len(addresses) // 2
                self.driver.map(addresses[:half], handles[:half])
                self.driver.unmap(addresses[:half])
            self._fail()
        self.driver.map(addresses, handles)

    def set_access(self, addresses: IntArray) -> None:
        if self._is_due("set_access"):
            if self._half_way:
                self.driver.set_access(addresses[: len(addresses) // 2])
            self._fail()
        self.driver.set_access(addresses)

    def unmap(self, addresses: IntArray) -> None:
        if self._is_due("unmap"):
            self._fail()
        self.driver.unmap(addresses)

    def release(self, handles: IntArray) -> None:
        if self._is_due("release"):
            self._fail()
        self.driver.release(handles)

    def export(self, handle: int) -> int:
        return self.driver.export(handle)

    def close(self) -> None:
        self.driver.close()

    def _is_due(self, method: str) -> bool:
        if method != self._method or self._countdown == 0:
            return False
        self._countdown -= 1
        return self._countdown == 0

    def _fail(self) -> None:
        if self._shortage:
            raise OutOfMemoryError(1, 0, f"{self._method} was told to fail")
        raise DriverError(self._method, errno.EIO, "it was told to fail")
