"""A page of a GPU's memory in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vattention.memory import open_driver
from vattention.memory.tensor import as_tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def check(result: tuple[object, ...]) -> object:
    code, *values = result
    assert int(code) == 0, code  # type: ignore[call-overload]
    return values[0] if values else None


def read(fd: int, nbytes: int) -> bytes:
    """The first bytes of an exported page."""
    from cuda.bindings import driver as cuda

    check(cuda.cuInit(0))
    check(cuda.cuCtxPushCurrent(check(cuda.cuDevicePrimaryCtxRetain(check(cuda.cuDeviceGet(0))))))
    kind = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    handle = check(cuda.cuMemImportFromShareableHandle(fd, kind))
    address = check(cuda.cuMemAddressReserve(nbytes, 0, 0, 0))
    check(cuda.cuMemMap(address, nbytes, 0, handle, 0))
    access = cuda.CUmemAccessDesc()
    access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = 0
    access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    check(cuda.cuMemSetAccess(address, nbytes, [access], 1))
    found = bytearray(8)
    check(cuda.cuMemcpyDtoH(found, address, len(found)))
    return bytes(found)


def test_another_process_reads_what_was_written() -> None:
    driver = open_driver("cuda:0")
    if not driver.capabilities.exportable:
        pytest.skip("this GPU exports no memory")
    address = driver.reserve(driver.page_nbytes)
    addresses = np.array([address], np.int64)
    handles = driver.create(addresses)
    driver.map(addresses, handles)
    driver.set_access(addresses)
    page = as_tensor(address, driver.page_nbytes, device=driver.capabilities.device, owner=driver)
    page[:8] = torch.arange(1, 9, dtype=torch.uint8, device="cuda:0")
    torch.cuda.synchronize()
    fd = driver.export(int(handles[0]))
    try:
        call = f"from {__name__} import read; print(list(read({fd}, {driver.page_nbytes})))"
        result = subprocess.run(
            [sys.executable, "-c", call],
            check=False,
            capture_output=True,
            text=True,
            pass_fds=[fd],
            cwd=Path(__file__).parents[2],
        )
    finally:
        os.close(fd)
    assert result.stdout.strip() == str(list(range(1, 9))), result.stderr
    del page
    driver.close()
