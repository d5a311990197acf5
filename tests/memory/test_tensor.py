"""Addresses as tensors."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from tests.memory.fake_cuda import GRANULARITY
from vattention.memory import open_driver
from vattention.memory.pool import PagePool
from vattention.memory.region import Region
from vattention.memory.tensor import _DeviceBytes, as_tensor, strided


def region_of(nbytes: int, device: str = "cpu") -> Region:
    driver = open_driver(device)
    return Region(driver, PagePool(driver, nbytes), nbytes)


def test_a_tensor_is_the_memory_at_the_address() -> None:
    region = region_of(2**40)
    region.commit(np.array([0, 3]))
    tensor = as_tensor(region.address, region.nbytes, device="cpu", owner=region)
    assert (tensor.shape, tensor.dtype, tensor.data_ptr()) == ((2**40,), torch.uint8, region.address)
    tensor[3 * region.page_nbytes] = 9
    region.alias(np.array([7]), region.pages(np.array([3])))
    assert tensor[7 * region.page_nbytes] == 9


def test_the_tensor_alone_keeps_the_memory_alive() -> None:
    region = region_of(2**20)
    region.commit(np.arange(4))
    driver = weakref.ref(region._driver)
    view = strided(
        as_tensor(region.address, region.nbytes, device="cpu", owner=region), torch.float32, 0, (4, 1024), (4096, 4)
    )
    view.fill_(2.5)
    del region
    gc.collect()
    assert driver() is not None
    assert view.sum() == 2.5 * 4096
    del view
    gc.collect()
    assert driver() is None


def test_no_memory_gives_a_tensor_without_any() -> None:
    region = region_of(2**40, "meta")
    tensor = as_tensor(region.address, region.nbytes, device="meta", owner=region)
    assert tensor.is_meta
    assert strided(tensor, torch.bfloat16, 64, (8, 16), (1024, 2)).shape == (8, 16)


def test_device_memory_is_described_as_bytes() -> None:
    owner = object()
    described = _DeviceBytes(2**45, 3 * GRANULARITY, owner)
    interface = described.__cuda_array_interface__
    assert interface["data"] == (2**45, False)
    assert interface["shape"] == (3 * GRANULARITY,)
    assert interface["typestr"] == "|u1"
    assert described.owner is owner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64])
def test_strided_views_have_offsets_and_strides_in_bytes(dtype: torch.dtype) -> None:
    size = dtype.itemsize
    buffer = torch.zeros(997, dtype=torch.uint8)
    view = strided(buffer, dtype, 16 * size, (3, 2, 4), (20 * size, 4 * size, size))
    view[2, 1, 3] = 1
    start = (16 + 2 * 20 + 4 + 3) * size
    assert buffer.nonzero().flatten().tolist()[0] in range(start, start + size)
    assert view.dtype == dtype
    assert view.sum() == 1


def test_strided_refuses_what_does_not_fit() -> None:
    buffer = torch.zeros(64, dtype=torch.uint8)
    strided(buffer, torch.float32, 32, (2, 4), (16, 4))
    strided(buffer, torch.float32, 64, (0, 4), (16, 4))
    with pytest.raises(ValueError, match="multiples of 4"):
        strided(buffer, torch.float32, 2, (1,), (4,))
    with pytest.raises(ValueError, match="multiples of 4"):
        strided(buffer, torch.float32, 0, (2,), (6,))
    with pytest.raises(ValueError, match="ends at byte 80"):
        strided(buffer, torch.float32, 32, (3, 4), (16, 4))
