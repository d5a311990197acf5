from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kv.contents import PAGE, sharing_manager
from vattention.kv.virtual import VirtualManager
from vattention.memory.driver import Driver
from vattention.memory.host import HostDriver
from vattention.memory.null import NullDriver


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """These tests move a few bytes at a time, for which threads cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["host", "host-sliced", "null"])
def cache(request: pytest.FixtureRequest) -> Iterator[VirtualManager]:
    """A small cache that shares pages, where a file has none of its own."""
    driver: Driver = NullDriver(PAGE) if request.param == "null" else HostDriver(PAGE)
    made = sharing_manager(driver, sliced=request.param == "host-sliced")
    yield made
    made.close()
