"""Choosing a driver by torch's name of the device."""

from __future__ import annotations

import pytest
import torch

from vattention.errors import ConfigError
from vattention.memory import open_driver


@pytest.mark.parametrize(("device", "name"), [("cpu", "host"), ("meta", "null")])
def test_devices(device: str, name: str) -> None:
    driver = open_driver(device)
    assert (driver.capabilities.name, driver.capabilities.device) == (name, device)
    driver.close()


def test_the_page_size_is_passed_on() -> None:
    for device in ("cpu", "meta"):
        driver = open_driver(device, 2**16)
        assert driver.page_nbytes == 2**16
        driver.close()


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match="mps"):
        open_driver("mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_so() -> None:
    with pytest.raises(ConfigError, match="torch sees 0 CUDA devices"):
        open_driver("cuda:0")
