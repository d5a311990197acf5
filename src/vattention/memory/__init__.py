"""Virtual memory: addresses, physical pages, and who holds them."""

from __future__ import annotations

from vattention.errors import ConfigError
from vattention.memory.driver import Driver


def open_driver(device: str, page_nbytes: int | None = None) -> Driver:
    """The driver for one of torch's devices: "cpu", "cuda", "cuda:1", or "meta" for no memory at all.

    Args:
        page_nbytes: bytes of a page; None for the smallest the device has.

    Raises:
        ConfigError: there is no driver for this device, or it does not work on this machine.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu":
        from vattention.memory.host import HostDriver

        return HostDriver(page_nbytes)
    if kind == "cuda":
        from vattention.memory.cuda import CudaDriver

        return CudaDriver(int(index or 0), page_nbytes)
    if kind == "meta":
        from vattention.memory.null import NullDriver

        return NullDriver(page_nbytes)
    raise ConfigError(f"device {device!r} has no memory that can be mapped on demand; use cpu, cuda or cuda:N")
